"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
from click.testing import CliRunner
from simple_scenes import SHIPS, UTM, BrightHeader, BrightWeights, canvas, write_scene

from babelrs_geo import __version__, cli
from babelrs_geo.cli import detect as verbs
from babelrs_geo.cli import program
from babelrs_geo.cli import progress as bars
from babelrs_geo.errors import BatchError

SMALL = ["--tile", "48", "--overlap", "16"]
detect_module = sys.modules["babelrs_geo.detect"]  # the package's own name is the function


@pytest.fixture
def weights(monkeypatch):
    """Stands in for the bundled weights; tests may change what it does."""
    made = BrightWeights()
    loads = []

    def load(name="compact", device="cpu"):
        loads.append((name, device))
        return made

    made.loads = loads
    monkeypatch.setattr("babelrs_geo.models.zoo.load", load)
    return made


@pytest.fixture
def harbour(tmp_path, monkeypatch):
    """A scene in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return write_scene(tmp_path / "harbour.tif", canvas(100, 100, SHIPS)).name


def call(*arguments):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


def test_detect_writes_the_default_output_and_says_what_where_and_how_to_open_it(harbour, weights, tmp_path):
    result = call("detect", harbour, "--sensor", "sar", *SMALL)
    assert (result.exit_code, result.stderr) == (0, "")
    found, written = result.stdout.splitlines()
    assert found.startswith("Found 4 objects (4 ship) in 9 of 9 tiles in ")
    assert written == (
        "Written to harbour_detections.gpkg: drag it into QGIS, or run: qgis harbour_detections.gpkg"
    )
    assert len(gpd.read_file(tmp_path / "harbour_detections.gpkg", layer="detections")) == 4
    assert len(gpd.read_file(tmp_path / "harbour_detections.gpkg", layer="coverage")) >= 1
    assert weights.loads == [("compact", "cpu")]


def test_the_command_that_opens_the_result_can_be_pasted(harbour, weights):
    result = call("detect", harbour, "--sensor", "sar", *SMALL, "-o", "my small ships.gpkg")
    assert result.stdout.endswith("or run: qgis 'my small ships.gpkg'\n")


def test_quiet_is_silent_and_json_is_one_document(harbour, weights):
    result = call("detect", harbour, "--sensor", "sar", *SMALL, "--quiet", "-o", "a.geojson")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    result = call("detect", harbour, "--sensor", "sar", *SMALL, "--json", "-o", "b.parquet")
    told = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (told["output"], told["detections"], told["classes"]) == ("b.parquet", 4, {"ship": 4})
    assert sum(told["tiles"].values()) == 9 and told["parameters"]["tile"] == 48
    assert call("detect", harbour, "--quiet", "--json").exit_code == 2


def test_all_options_arrive(harbour, weights, tmp_path):
    result = call(
        "detect", harbour, "--sensor", "SAR", "--classes", "ship", "--score", ".4", "--gsd", "native",
        "--crs", "EPSG:4326", "--device", "cpu", "--batch", "2", "--weights", "mine.safetensors", "--json",
        "--bands", "1",
        "--units", "uint8", "--range", "0", "255", "--no-collar", *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert weights.loads == [("mine.safetensors", "cpu")]
    assert weights.asked == [("sar", 0.4, ("ship",))]
    parameters = told["parameters"]
    assert (parameters["gsd"], parameters["batch"], parameters["device"]) == ("native", 2, "cpu")
    assert gpd.read_file(tmp_path / "harbour_detections.gpkg", layer="detections").crs == "EPSG:4326"


def test_the_model_does_not_run_where_the_output_exists_and_overwrite_replaces_it(harbour, weights, tmp_path):
    output = tmp_path / "harbour_detections.gpkg"
    output.write_text("precious")
    result = call("detect", harbour, "--sensor", "sar")
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr and len(result.stderr.splitlines()) == 1
    assert output.read_text() == "precious" and not weights.loads
    assert call("detect", harbour, "--sensor", "sar", "--overwrite").exit_code == 0
    assert output.read_bytes()[:6] == b"SQLite"


def test_tiles_that_cannot_be_read_are_told_and_the_rest_is_written(harbour, weights, tmp_path, monkeypatch):
    from babelrs_geo import scenes
    from babelrs_geo.errors import SceneError

    read = scenes.Scene.read

    def flaky(self, window, *how):
        if tuple(window[:2]) == (0, 0):
            raise SceneError("block 0 is damaged")
        return read(self, window, *how)

    monkeypatch.setattr(scenes.Scene, "read", flaky)
    result = call("detect", harbour, "--sensor", "sar", *SMALL)
    assert result.exit_code == program.EXIT_INCOMPLETE
    assert "in 8 of 9 tiles" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("babelrs-geo: warning: 1 tile could not be read (block 0 is damaged)")
    ground = gpd.read_file(tmp_path / "harbour_detections.gpkg", layer="coverage")
    assert ground.set_index("state").loc["failed", "reason"] == "block 0 is damaged"


def test_the_package_warns_in_one_line_once_and_others_are_not_heard(harbour, weights, monkeypatch):
    weights.header = BrightHeader(gsd={"sar": (50.0, 60.0)})
    detector = weights.detector

    def noisy(*arguments):
        warnings.warn("for developers of torch", UserWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return detector(*arguments)

    monkeypatch.setattr(weights, "detector", noisy)
    result = call("detect", harbour, "--sensor", "sar", "--quiet")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("babelrs-geo: warning: the scene's pixels of 10 m are read resampled 5.0x coarser")


def test_an_interrupted_run_ends_with_130_and_leaves_nothing(harbour, weights, tmp_path):
    weights.fails = KeyboardInterrupt()
    result = call("detect", harbour, "--sensor", "sar")
    assert result.exit_code == 130
    assert result.stderr.strip() == "babelrs-geo: error: interrupted, nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["harbour.tif"]


@pytest.mark.parametrize("wrong", [["--classes", "shp"], ["--device", "cuda:7"], ["--dask", "other.json"]])
def test_a_wrong_option_does_not_cost_what_an_earlier_run_did(harbour, weights, tmp_path, wrong):
    """Stopped while it was writing, too, a run may go on."""
    (tmp_path / "other.json").write_text("{}")
    save = detect_module.Found.save
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(detect_module.Found, "save", interrupt)
        result = call("detect", harbour, "--sensor", "sar", *SMALL)
    assert result.exit_code == 130 and "run the same with --resume" in result.stderr
    parts = tmp_path / ".harbour_detections.gpkg.parts"
    kept = sorted(path.name for path in parts.iterdir())
    assert any(name.endswith(".arrow") for name in kept) and detect_module.Found.save is save
    for resume in ([], ["--resume"]):
        assert call("detect", harbour, "--sensor", "sar", *SMALL, *wrong, *resume).exit_code == 1
        assert sorted(path.name for path in parts.iterdir()) == kept
    assert call("detect", harbour, "--sensor", "sar", *SMALL, "--resume").exit_code == 0
    assert not parts.exists() and len(gpd.read_file("harbour_detections.gpkg", layer="detections")) == 4


def test_what_is_done_stays_where_memory_runs_out(harbour, weights, tmp_path, monkeypatch):
    def full(scene, weights, options, progress, running):
        Path(running.spool).mkdir()
        Path(running.spool, "00000000.arrow").touch()
        raise BatchError("out of memory with a batch of 2 tiles")

    monkeypatch.setattr(detect_module, "detect", full)
    result = call("detect", harbour, "--sensor", "sar", *SMALL)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "--resume with the same batch, or --overwrite with a smaller one" in result.stderr
    assert (tmp_path / ".harbour_detections.gpkg.parts" / "00000000.arrow").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_fault_of_the_program_is_one_line_too_and_the_traceback_is_there_when_asked(
    harbour, weights, monkeypatch
):
    weights.fails = RuntimeError("shapes\ndo not match")
    result = call("detect", harbour, "--sensor", "sar")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("babelrs-geo: error: unexpected RuntimeError: shapes do not match")
    monkeypatch.setenv(program.DEBUG_VARIABLE, "1")
    assert isinstance(call("detect", harbour, "--sensor", "sar").exception, RuntimeError)


def test_info_tells_what_how_where_and_how_long(harbour, weights):
    result = call("info", harbour, "--sensor", "sar", *SMALL)
    assert (result.exit_code, result.stderr) == (0, "")
    told = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    told = {name: value.strip() for name, value in told.items()}
    assert "100 x 100" in told["format"]
    assert "sar" in told["sensor"]
    assert UTM in told["georeference"]
    assert "valid" in told["validity"]
    assert told["read at"] == "10 m a pixel, the scene's own"
    assert told["tiles"].startswith("9 of 48 px")
    assert told["estimated time"].endswith("s a tile, measured here)")
    assert json.loads(call("info", harbour, "--sensor", "sar", "--json").stdout)["sensor"] == told["sensor"]


@pytest.mark.parametrize(("option", "value"), [("--dem", "nofile.tif"), ("--height", "50")])
def test_what_is_for_rpcs_is_refused_for_one_scene_without_and_warned_of_among_others(
    harbour, weights, tmp_path, option, value
):
    told = f"{option} is for scenes placed by RPCs, and harbour.tif has an affine: leave it out"
    for verb in ("detect", "info", "tile"):
        result = call(
            verb, harbour, "--sensor", "sar", option, value, *(["-o", "x"] if verb == "tile" else [])
        )
        assert (result.exit_code, result.stderr) == (1, f"babelrs-geo: error: {told}\n")
    write_scene(tmp_path / "plain.tif", canvas(100, 100, SHIPS), crs=None)
    both = ("tile", harbour, "plain.tif", "--sensor", "sar", option, value, "-o", "x", "--workers", "1")
    result = call(*both)
    assert result.exit_code == 0 and f"warning: {told}\n" in result.stderr
    assert "plain.tif has no georeference: leave it out" in result.stderr


def test_info_tells_where_detection_would_refuse_and_why(harbour, weights):
    result = call("info", harbour, "--sensor", "ir")
    assert result.exit_code == 0
    line = result.stdout.splitlines()[-1]
    assert line.startswith("detection ") and 'not possible: weights "bright" know nothing of ir' in line
    result = call("info", harbour, "--sensor", "sar", "--aoi", "nofile.gpkg")
    assert "not possible: nofile.gpkg" in result.stdout.splitlines()[-1]


def test_the_bar_shows_tiles_a_second_on_a_terminal_only(monkeypatch):
    with bars.progress_bar("harbour.tif", hidden=False) as progress:
        assert progress is None  # under pytest stderr is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with bars.progress_bar("harbour.tif", hidden=True) as progress:
        assert progress is None
    with bars.progress_bar("harbour.tif", hidden=False) as progress:
        progress(1, 10)
        progress(10, 10)


@pytest.mark.parametrize(
    ("scene", "stem"),
    [
        ("scene.tif", "scene"),
        ("/data/S1A_IW.SAFE/measurement/vv.tiff", "vv"),
        ("https://host/a/b.tif?sig=1/2", "b"),
        ("/vsizip/archive.zip/c.tif", "c"),
        ("folder.SAFE/", "folder"),
        ('NETCDF:"/data/m.nc":heat', "m_heat"),
        ('NETCDF:"m.nc":heat', "NETCDF_m_heat"),
        ("SENTINEL2_L2A:/data/MTD.xml:10m:EPSG_32631", "MTD_10m_EPSG_32631"),
    ],
)
def test_the_default_output_is_named_after_the_scene(scene, stem):
    assert verbs._stem(scene) == stem


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.21, "3.2 s"), (75, "75 s"), (600, "10 min"), (5 * 3600 + 120, "5 h 02 min")]
)
def test_durations_are_said_as_people_do(seconds, said):
    assert bars.duration(seconds) == said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["detect"], "Missing argument 'SCENE'"),
        (["detect", "x.tif", "--sensor", "radar"], "'radar' is not one of"),
        (["detect", "x.tif", "--gsd", "fine"], 'neither metres per pixel nor "native"'),
        (["detect", "x.tif", "--bands", "r,g,b"], "not a comma-separated list of band numbers"),
        (["detect", "x.tif", "--unknown"], "No such option"),
        (["dectet"], "No such command"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("babelrs-geo: error: ") and words in line and "--help'" in line


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_training_without_its_packages_says_how_to_install_them(verb, tmp_path):
    code = "import sys; sys.modules['lightning'] = None; from babelrs_geo import cli; cli.main()"
    command = [sys.executable, "-c", code, verb, "--recipe", "compact", "--data", "x", "-o", "y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "babelrs-geo: error: training needs packages that are not installed (lightning): "
        f'pip install "babelrs-geo[{verb}]"\n'
    )


def test_help_and_version_need_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "babelrs_geo"]
    for option, words in (("--help", "detect"), ("--version", __version__)):
        result = subprocess.run([*command, option], capture_output=True, text=True, check=True, timeout=60)
        assert words in result.stdout
        loaded = {line.split("|")[-1].strip().partition(".")[0] for line in result.stderr.splitlines()}
        assert not loaded & {"torch", "rasterio", "numpy", "geopandas", "pandas", "shapely", "rich", "numba"}


def test_every_option_says_what_it_does():
    for verb in cli.main.commands.values():
        assert verb.help
        for option in verb.params:
            assert option.param_type_name == "argument" or option.help, option.name
        shown = call(verb.name, "--help")
        assert shown.exit_code == 0 and "[default: (" not in " ".join(shown.stdout.split())


def test_the_same_run_gives_the_same_bytes_with_the_clock_fixed(harbour, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("OGR_CURRENT_DATE", "2026-01-02T03:04:05.000Z")
    for name in ("a.gpkg", "b.gpkg"):
        assert call("detect", harbour, "--sensor", "sar", *SMALL, "-o", name).exit_code == 0
    assert (tmp_path / "a.gpkg").read_bytes() == (tmp_path / "b.gpkg").read_bytes()


def test_nothing_found_is_said_and_written(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scene(tmp_path / "calm.tif", np.full((60, 60), 20, np.uint8))
    result = call("detect", "calm.tif", "--sensor", "sar")
    assert result.stdout.startswith("Found nothing in 1 of 1 tiles")
    assert gpd.read_file("calm_detections.gpkg", layer="detections").empty
