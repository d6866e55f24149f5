"""Idle cores are lent for the length of a request, and come back inside it. regions.c says how."""
