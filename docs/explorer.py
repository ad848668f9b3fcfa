"""A page that shows a VAE with two latent dimensions at work: draw a digit, see q(z|x), move z, see x_pred.

    python vae.py --beta 1 --latent-dim 2 --epochs 30
    python -m docs.explorer runs/vae-beta1-z2          # makes runs/vae-beta1-z2/explorer.html, to open in a browser

It is docs/explorer.html with the run's network in place of ours: one file, which needs no internet.
"""

import base64
import json
import re
import sys
from argparse import ArgumentParser
from os.path import expanduser
from pathlib import Path

import torch
from matplotlib.colors import TABLEAU_COLORS
from torch import nn

import common
from vae import VAE, Decoder, Encoder


def pack(layer):
    """A linear layer's weights as int16 in base64, with a scale for each output, and its biases."""
    scale = layer.weight.abs().amax(dim=1) / 32767  # (out_features,)
    weight = (layer.weight / scale[:, None]).round().to(torch.int16)
    text = base64.b64encode(weight.numpy().tobytes()).decode()
    return {"weight": text, "scale": scale.tolist(), "bias": layer.bias.tolist()}


def is_known(model, hidden_dim):
    """Whether the model computes what the page does: it has vae.py's layers, and a copy's forward changed nothing."""
    known = VAE(Encoder(784, hidden_dim, 2), Decoder(2, hidden_dim, 784))
    if repr(model) != repr(known):
        return False
    known.load_state_dict(model.state_dict())
    x = torch.rand(10, 784)
    z = torch.randn(10, 2)
    same_encoder = torch.allclose(torch.stack(model.encoder(x)), torch.stack(known.encoder(x)))
    return same_encoder and torch.allclose(model.decoder(z), known.decoder(z))


@torch.inference_mode()
def main(argv=None):
    parser = ArgumentParser("python -m docs.explorer", description=__doc__, formatter_class=common.Help)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a file like its checkpoint.pt")
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="the images (default: the run's)")
    parser.add_argument("--data", type=expanduser, help="folder of the data sets (default: the run's)")
    parser.add_argument("--out", type=expanduser, help="folder to write to (default: the run's)")
    args = parser.parse_args(argv)

    model, _, config = common.open_run(args.run, "cpu")
    if not hasattr(model, "encoder") or not is_known(model, config.hidden_dim):
        sys.exit(f"{args.run}: the page needs vae.py's fully connected VAE with --latent-dim 2 on gray 28x28 images")

    # the first 2,000 test images as points of the plane
    images = common.load_run_images(config, args)
    mean, _ = model.encoder(images.test[:2000].flatten(1))
    classes = []
    for label, (name, color) in enumerate(zip(images.classes, TABLEAU_COLORS.values())):
        means = mean[images.test_labels[:2000] == label]
        median = means.median(dim=0).values.tolist()
        first_word = name.split()[0]  # MNIST's names are "4 - four"
        classes.append({"name": first_word, "color": color, "median": median, "means": means.tolist()})

    layers = {name: pack(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    network = {
        "run": Path(args.run).as_posix(),
        "epoch": config.epoch,
        "side": 20 if images.name == "mnist" else 28,  # what is drawn gets the size of the data set's images
        "classes": classes,
        "layers": layers,
    }
    line = f"const network = {json.dumps(network)};"
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = re.sub("^const network = .*", lambda _: line, page, flags=re.MULTILINE)

    path = common.output_folder(args.out, args.run) / "explorer.html"
    path.write_text(page, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
