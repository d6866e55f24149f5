"""Handler files that archives.py packs. Each stands alone: a worker imports it from the extracted archive."""
