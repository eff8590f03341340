"""Search your photos from Python: index a folder, ask for the images most like one, rerank.

    python examples/search_photos.py [PHOTOS QUERY]

Without a folder it draws one: 12 scenes, each seen in 6 overlapping crops.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import ggem_jax


def draw_photos(folder: Path, scenes: int = 12, views: int = 6) -> None:
    """Writes crops of random scenes as `folder/SCENE-VIEW.jpg`."""
    rng = np.random.default_rng(0)
    for scene in range(scenes):
        coarse = rng.integers(0, 255, (9, 12, 3), np.uint8)
        image = Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC)
        for _ in range(25):
            x, y, size = rng.integers(0, (440, 320, 70))
            color = tuple(int(value) for value in rng.integers(0, 255, 3))
            image.paste(color, (int(x), int(y), int(x + size), int(y + size)))
        for view in range(views):
            x, y = rng.integers(0, (120, 90))
            image.crop((int(x), int(y), int(x) + 360, int(y) + 270)).save(
                folder / f"{scene:02}-{view}.jpg"
            )


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        if len(sys.argv) == 3:
            photos, query = map(Path, sys.argv[1:])
        else:
            photos, query = Path(temporary, "photos"), Path(temporary, "photos", "00-0.jpg")
            photos.mkdir()
            draw_photos(photos)
        report = ggem_jax.build_index(photos, Path(temporary, "photos.index"))
        index = ggem_jax.Index.open(Path(temporary, "photos.index"))
        found = index.search([query], k=6, rerank="superglobal")
        print(f"{report.added} images indexed, those most like {query.name}:")
        for path, score, before in zip(
            found.paths[0], found.scores[0], found.ranks_before[0], strict=True
        ):
            print(f"{path}  score {score:.3f}  rank before reranking {before}")


if __name__ == "__main__":
    main()
