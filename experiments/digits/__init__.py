"""The bundled digits: data sets, pretraining of the anchor, learning rate."""
