"""The BabelRS detector: backbone, neck, heads, and the weights that fill them."""
