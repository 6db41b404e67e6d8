"""`csv.import`."""
