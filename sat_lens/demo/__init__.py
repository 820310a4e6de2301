"""The bundled demo model: the list of its corpus and its training recipe."""
