"""Parts of `real_scenes.py`."""
