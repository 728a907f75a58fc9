"""Pictures and position tasks: reading data sets, making tasks, augmenting batches on the device.

Nothing here knows of a configuration or of a model.
"""
