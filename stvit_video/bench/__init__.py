MODES = ("forward", "training")  # what is timed of a model
