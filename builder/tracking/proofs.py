"""The small files of a bundle that a tracker gets even where the bundle stays where it is."""

PROOFS = ("manifest.json", "verification.json", "README.md")
