"""Wire protocols, one file each, all thin over the same engine and the same table of errors."""
