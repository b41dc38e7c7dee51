"""From your own annotated pictures to AP and to COCO's result files, by the same commands as everything else.

python examples/detect_coco.py annotations/instances_train.json photos/

Without arguments, on 16 generated pictures of coloured squares for a few steps: nothing is learnt yet.
"""

import json
import sys
import tempfile
from pathlib import Path

from synchromesh import cli
from synchromesh.testing.squares import write_squares

FEW = [
    *("--epochs=2", "--batch-size=8", "--head.width=16", "--model.embed-dim=16", "--model.depths", "1", "1"),
    *("--model.num-heads", "1", "2", "--model.experts.blocks.1", "0", "--model.experts.num-experts=4"),
]


def command(*words: object) -> None:
    print("$ synchromesh", *words, flush=True)
    code = cli.main([str(word) for word in words])
    if code:
        sys.exit(code)


with tempfile.TemporaryDirectory() as scratch:
    if len(sys.argv) == 3:
        annotations, images, options, out = Path(sys.argv[1]), Path(sys.argv[2]), [], Path("runs")
    else:
        out, options = Path(scratch), FEW
        annotations, images = write_squares(out, "train", 16), out / "images"
        write_squares(out, "val", 4)
    run = out / "objects"
    # Which task, masks or not, and how large the images are, is found from the data.
    command("train", f"--data={annotations}", f"--images={images}", f"--run={run}", *options)
    command("eval", run)
    # All pictures of the folder: one drawn picture each, and predictions.json, which every COCO tool reads.
    command("predict", images, f"--run={run}", "--least=0.01", f"--draw={out / 'answers'}")
    results = json.loads((out / "answers" / "predictions.json").read_text())
    table = json.loads((out / "answers" / "images.json").read_text())
    print(f"{len(results)} objects in {len(table['images'])} pictures; the first ones:")
    for one in results[:3]:
        print({name: one[name] for name in ("image_id", "category_id", "bbox", "score")})
