"""Import from and export to other formats: one file per family; a key map is a table used in both directions."""
