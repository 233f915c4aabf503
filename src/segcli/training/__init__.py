"""From a labelled data set to a model file."""
