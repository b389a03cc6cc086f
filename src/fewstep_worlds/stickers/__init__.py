"""Sticker scenes: an endless set of 64x64 pictures of drawn emoji, with prompts whose every fact can be checked.

- `vocabulary`: concepts, styles, colours, patterns, and their words in English and Chinese
- `sprites`: the drawn emoji, read from one sheet a style
- `scene`: a scene as a pure function of (seed, index)
- `draw`: a scene as a picture
- `claim`: what a prompt states, and whether a scene agrees
- `grammar`: claims to sentences and back
- `parallel`: text pairs of Chinese and English sentences
- `heldout`: facts and words that are held out of training
- `prompts`: sentences about scenes, and sets of unseen ones
- `matching`: scenes that agree with a claim
- `dataset`: pictures and prompts of whole index ranges
- `metrics`: scene accuracy, and the suite of an evaluation
- `world`: all of it as the bundled world
- `autoencoder`, `reader`, `teacher`: what is trained on them
"""
