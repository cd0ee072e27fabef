"""The proof that every runtime says the same."""
