"""Recipes; shipped as `compressor/configs`."""
