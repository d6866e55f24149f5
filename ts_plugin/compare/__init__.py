"""`ts-cores compare`: what slices win here, with this archive. Servers side by side, a verdict, a table, a picture."""
