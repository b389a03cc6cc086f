"""The bundled default world: the Emoji-8 pictures and the models trained on them."""
