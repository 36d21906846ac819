"""Reads folders of results, and shows them."""
