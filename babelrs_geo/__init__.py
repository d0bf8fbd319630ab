"""Find objects in large georeferenced SAR, infrared and RGB scenes, and hand over vectors for QGIS."""
