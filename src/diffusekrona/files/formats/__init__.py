"""One file per file format. Each reads and writes factors and knows no model."""
