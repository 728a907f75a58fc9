"""timm's families with a slot for encodings: attention layers, and one file for each family of models.

A host is found by the class of a timm model and converts it in place. `visionpos.convert` is the way in.
"""
