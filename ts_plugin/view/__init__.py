"""Who has which cores, for people: values first (view), then JSON, a terminal, SVG, a web page, sentences."""
