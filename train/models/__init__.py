"""The networks that come with alexprep, and the layers that they are made of."""
