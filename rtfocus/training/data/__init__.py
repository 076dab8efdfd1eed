"""Data: sharp fields, drawn specimens and the blurred images made of them."""
