"""Image retrieval: pictures -> descriptors -> index -> ranking."""
