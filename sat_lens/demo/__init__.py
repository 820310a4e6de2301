"""The bundled demo model: its weights, and the list of the corpus that it was trained on."""
