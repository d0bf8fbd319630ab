"""The public surface: what `import babelrs_geo` gives, no less and no more."""

from __future__ import annotations

import babelrs_geo


def test_the_public_names_are_these():
    assert sorted(babelrs_geo.__all__) == [
        "DetectOptions",
        "Found",
        "Running",
        "Scene",
        "SceneOptions",
        "Sensor",
        "Workers",
        "__version__",
        "detect",
        "open_scene",
    ]


def test_each_exists_and_says_what_it_is():
    for name in babelrs_geo.__all__:
        value = getattr(babelrs_geo, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name


def test_detect_is_the_function_even_after_its_module_was_imported():
    import babelrs_geo.detect

    assert callable(babelrs_geo.detect)
    assert babelrs_geo.detect.__name__ == "detect"


def test_dir_lists_them():
    assert set(babelrs_geo.__all__) <= set(dir(babelrs_geo))
