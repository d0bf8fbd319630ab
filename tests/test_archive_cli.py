"""`babelrs-geo archive` as a person uses it, with real weights that are tiny."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from bright_archive import make_archive
from click.testing import CliRunner
from make_safe import make_safe, zipped
from test_archive_run import wait_for
from test_checkpoints import header
from tiny_model import TINY

from babelrs_geo import cli
from babelrs_geo.archive.ledger import Ledger, locked
from babelrs_geo.models import checkpoints
from babelrs_geo.models.detector import Detector


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoints.save(path, Detector(TINY), header())
    return str(path)


def call(*arguments):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


def test_a_folder_with_a_safe_product_and_a_bad_file_from_run_to_retry(tmp_path, weights):
    import numpy as np

    make_archive(tmp_path / "in", 2)
    safe = make_safe(tmp_path / "in", np.full((64, 80), 50, np.uint16))
    zipped(safe)
    (tmp_path / "in" / "bad.tif").write_text("no raster")
    out = tmp_path / "out"
    command = ["archive", "run", tmp_path / "in", "-o", out, "--sensor", "sar", "--weights", weights]
    result = call(*command, "--gsd", "native", "--overlap", 16, "--format", "parquet")
    assert result.exit_code == 3, result.output
    assert result.stdout.startswith("5 scenes in ") and "failed      1" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"babelrs-geo: warning: failed: {tmp_path / 'in' / 'bad.tif'} cannot be opened")
    status = json.loads(call("archive", "status", out, "--json").stdout)
    assert status["states"]["done"] == 4 and status["states"]["failed"] == 1
    assert status["run"]["parameters"]["weights"] == checkpoints.sha256(weights)
    assert [f["source"] for f in status["failures"]] == [str(tmp_path / "in" / "bad.tif")]
    told = call("archive", "status", out)
    assert told.stdout.splitlines()[0] == "done        4" and "bad.tif" in told.stderr

    verified = call("archive", "verify", out)
    assert (verified.exit_code, verified.stdout) == (0, "4 outputs read, 0 faults, 0 stray files.\n")
    with Ledger(out) as ledger:
        output = ledger.one("SELECT output FROM scenes WHERE source LIKE '%s000.tif'")
    (out / output).write_bytes((out / output).read_bytes()[:-30])
    (out / "results" / "stray.parquet").touch()
    verified = call("archive", "verify", out, "--again", "--json")
    assert verified.exit_code == 3
    (fault,) = json.loads(verified.stdout)["faults"]
    assert fault["source"].endswith("s000.tif") and "cannot be read" in fault["fault"]
    assert json.loads(verified.stdout)["strays"] == ["results/stray.parquet"]

    none = call("archive", "retry", out, "--reason", "tide")
    assert (
        none.stdout
        == 'No scene is failed or incomplete with "tide" in its reason: nothing is planned again\n'
    )
    assert call("archive", "retry", out).stdout.startswith("1 scenes are planned again: run the same ")
    (tmp_path / "in" / "bad.tif").unlink()
    with Ledger(out) as ledger:
        assert ledger.counts()["planned"] == 2
    again = call(*command, "--gsd", "native", "--overlap", 16, "--format", "parquet", "--json")
    assert json.loads(again.stdout)["worked"] == 2 and again.exit_code == 3
    assert call("archive", "verify", out).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nowhere", "-o", "out"], 1, "nowhere does not exist"),
        (["run", ".", "-o", "out", "--collection", "x"], 2, "belong to a search: pass --stac URL"),
        (["run", ".", "-o", "out", "--stac", "http://x", "--bbox", "1,2,3"], 2, "--bbox takes four numbers"),
        (["run", ".", "-o", "out", "--quiet", "--json"], 2, "exclude each other"),
        (["run", ".", "-o", "out", "--weights", "nothing"], 1, 'no weights "nothing"'),
        (["run", ".", "-o", "out", "--aoi", "nothing.gpkg"], 1, "nothing.gpkg cannot be read"),
        (["run", ".", "-o", "out", "--device", "cpu,cpu"], 1, "names a device twice"),
        (["status", "."], 1, "holds no archive"),
        (["retry", "."], 1, "holds no archive"),
        (["verify", "nowhere"], 1, "holds no archive"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("archive", *arguments)
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("babelrs-geo: error: ") and words in line


def test_without_a_source_a_run_goes_on_with_the_options_that_it_had(tmp_path, weights):
    make_archive(tmp_path / "in", 1)
    (tmp_path / "in" / "bad.tif").write_text("no raster")
    out = tmp_path / "out"
    had = ["--sensor", "sar", "--weights", weights, "--range", 0, 200, "--overlap", 16, "--no-collar"]
    assert call("archive", "run", tmp_path / "in", "-o", out, *had, "--format", "parquet").exit_code == 3
    assert call("archive", "retry", out).exit_code == 0
    for other, told in [
        (
            [],
            "with other --weights, with --sensor sar, with --range 0.0 200.0, with --overlap 16, with --no-collar, "
            "with --format parquet",
        ),
        ([*had, "--format", "parquet", "--crs", "EPSG:4326"], "was run without --crs: "),
    ]:
        refused = call("archive", "run", "-o", out, *other)
        (line,) = refused.stderr.splitlines()
        assert refused.exit_code == 1 and f"{out} was run " in line, line
        assert all(part in line for part in told.split(", "))
    again = call("archive", "run", "-o", out, *had, "--format", "parquet", "--json")
    assert again.exit_code == 3, again.stderr
    assert json.loads(again.stdout)["states"]["done"] == 1 and json.loads(again.stdout)["worked"] == 1


def test_a_run_without_source_and_plan_writes_nothing(tmp_path):
    result = call("archive", "run", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == (
        "babelrs-geo: error: nothing to do: pass a SOURCE, or -o of an archive that has a plan\n"
    )
    assert not (tmp_path / "out").exists()


def test_retry_waits_for_a_run_to_end(tmp_path):
    with Ledger(tmp_path, write=True):
        pass
    with locked(tmp_path):
        result = call("archive", "retry", tmp_path)
    assert result.exit_code == 1 and "is in use by process" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_a_run_says_how_to_go_on_and_leaves_nothing_half_done(number, tmp_path, weights):
    make_archive(tmp_path / "in", 60)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "babelrs_geo", "archive", "run", str(tmp_path / "in"), "-o", str(out)]
    command += ["--sensor", "sar", "--weights", weights, "--overlap", "16"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(out.glob("results/*/*/*.gpkg")), 120)
        process.send_signal(number)
        said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert (
        said[1]
        == f"babelrs-geo: error: stopped: what is done is in {out}; run the same again, and it goes on\n"
    )
    with Ledger(out) as ledger:
        counts = ledger.counts()
    assert counts["running"] == 0 and counts["done"] >= 1 and sum(counts.values()) == 60
    assert not (out / ".drafts").exists() and (out / "run.lock").read_text() == ""
    assert call("archive", "verify", out).exit_code == 0
