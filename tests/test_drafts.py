"""A file is whole or absent, and what stood in its place stays until it is whole."""

from __future__ import annotations

import stat

import pytest

from babelrs_geo.drafts import draft, is_draft
from babelrs_geo.errors import OutputError, SceneError


def test_a_draft_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "told.json"
    path.write_text("old")
    with draft(path) as hidden:
        assert hidden.parent == tmp_path and hidden.name.startswith(".told.json.")
        hidden.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    beside = tmp_path / "plain"
    beside.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(beside.stat().st_mode)


def test_a_draft_is_known_by_its_name(tmp_path):
    for name in ("told.json", ".told.json", "told"):
        with draft(tmp_path / name) as hidden:
            assert is_draft(hidden.name)
            hidden.write_text("")
        assert not is_draft(name)
    assert not any(map(is_draft, (".12", "told.12", ".gitignore", ".git", ".told.json.x", ".")))


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_what_ends_early_leaves_what_was_there_and_nothing_else(tmp_path, failure):
    path = tmp_path / "told.json"
    path.write_text("old")
    with pytest.raises(failure), draft(path) as hidden:
        hidden.write_text("half")
        raise failure
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_is_told_with_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "full.json"
    with (
        pytest.raises(
            OutputError, match=r"full\.json cannot be written \(No space left on device\); go on later$"
        ),
        draft(path, "go on later") as hidden,
    ):
        hidden.write_text("half")
        raise OSError(28, "No space left on device", str(hidden))
    with (
        pytest.raises(OutputError, match=r"full\.json cannot be written \(of two lines\); check the disk"),
        draft(path, failures=(ValueError,)),
    ):
        raise ValueError("of\n  two lines")
    assert not list(tmp_path.iterdir())
    missing = tmp_path / "no" / "full.json"
    with (
        pytest.raises(OutputError, match=r"no/full\.json cannot be written \(No such file"),
        draft(missing) as hidden,
    ):
        hidden.write_text("")
    with pytest.raises(OutputError, match="cannot be written"), draft(tmp_path / "folder.json") as hidden:
        hidden.write_text("")
        (tmp_path / "folder.json").mkdir()
    assert [found.name for found in tmp_path.iterdir()] == ["folder.json"]


def test_what_is_raised_on_purpose_is_told_as_it_is(tmp_path):
    with pytest.raises(SceneError, match=r"^scene$"), draft(tmp_path / "x"):
        raise SceneError("scene")
