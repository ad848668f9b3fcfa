"""t-SNE (van der Maaten and Hinton, 2008) of a VAE's codes of the test images, colored by class.

Codes of two dimensions are drawn as they are. It also prints the accuracy of the nearest neighbor (how often the
closest other code is of the same class) and how many dimensions of z the VAE uses.

    python tsne.py runs/vae-beta1                        # the means, as in the lab
    python tsne.py runs/vae-beta1 --codes std            # the standard deviations instead
    python tsne.py runs/vae-beta1 --codes pixels         # the images themselves
"""

import sys
from argparse import ArgumentParser
from os.path import expanduser

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

import common
import vae

TITLES = {
    "mean": "encoder means",
    "sample": "codes sampled from N(mean, std^2)",
    "std": "encoder standard deviations",
    "pixels": "pixels",
}


def dimensions_in_use(mean, log_var, threshold=0.01):
    """How many dimensions of z have a mean KL divergence above the threshold, in nats per image.

    mean and log_var are (N, latent_dim). The other dimensions have collapsed to the prior. Burda et al. (2015) count
    active units by the variance of the mean instead.
    """
    used = 0
    for j in range(mean.shape[1]):
        kl = vae.kl_divergence(mean[:, j : j + 1], log_var[:, j : j + 1])
        if kl / len(mean) > threshold:
            used += 1
    return used


def nearest_neighbor_accuracy(codes, labels):
    """The share, in 0..1, of codes (N, D) whose nearest other code has the same label (N,); both are NumPy arrays."""
    nearest = NearestNeighbors(n_neighbors=1).fit(codes).kneighbors(return_distance=False)[:, 0]
    return (labels[nearest] == labels).mean()


def draw(points, labels, classes, title):
    """A figure of points (N, 2) in a color for each class, whose name stands at their median; labels index classes."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    ax = figure.subplots()
    few = len(classes) <= 10
    colors = colormaps["tab10" if few else "gist_rainbow"].resampled(len(classes))
    for label, name in enumerate(classes):
        members = points[labels == label]
        ax.scatter(members[:, 0], members[:, 1], s=12, color=colors(label))
        if len(members):
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": colors(label), "alpha": 0.8}
            first_word = name.split()[0]  # MNIST's names are "4 - four"
            ax.text(*np.median(members, axis=0), first_word, ha="center", fontsize=11 if few else 5, bbox=box)
    ax.set(title=title, aspect="equal")
    return figure


def parse_args(argv):
    parser = ArgumentParser("tsne.py", description=__doc__, formatter_class=common.Help)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a file like its checkpoint.pt")
    parser.add_argument("--codes", choices=TITLES, default="mean", help="what to map of each image")
    parser.add_argument("--n", type=common.positive, default=1000, help="test images on the map")
    parser.add_argument("--perplexity", type=float, default=30.0, help="t-SNE's perplexity, below --n")
    parser.add_argument("--dataset", choices=[*common.SETS, "digits"], help="the images (default: the run's)")
    parser.add_argument("--data", type=expanduser, help="folder of the data sets (default: the run's)")
    parser.add_argument("--out", type=expanduser, help="folder to write to (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto is a GPU if there is one")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    model, _, config = common.open_run(args.run, device)
    if not hasattr(model, "encoder"):
        sys.exit(f"{args.run} has no encoder: only a VAE's codes are mapped")
    if config.autoencoder and args.codes in ("sample", "std"):
        sys.exit(f"--codes {args.codes}: an autoencoder has no variance; use mean or pixels")
    data = common.load_run_images(config, args)

    # the codes of all test images, and those to map
    torch.manual_seed(args.seed)
    chosen = torch.randperm(len(data.test))[: args.n]  # without replacement
    x = data.test.to(device).flatten(1)
    mean, log_var = model.encoder(x)
    std = torch.exp(0.5 * log_var)
    z = vae.reparameterize(mean, std)
    codes = {"mean": mean, "sample": z, "std": std, "pixels": x}[args.codes]
    codes = codes.cpu()[chosen].numpy()
    labels = data.test_labels[chosen].numpy()
    if codes.shape[1] == 1:
        sys.exit("codes of one dimension are not drawn: train with --latent-dim 2 or more")
    if (codes == codes[0]).all():
        sys.exit(f"all codes are equal, there is nothing to map: has the encoder of {args.run} collapsed?")

    # the map: codes of two dimensions as they are, others through t-SNE
    text = f"1-nearest-neighbor accuracy {nearest_neighbor_accuracy(codes, labels):.1%} of the codes"
    if codes.shape[1] == 2:
        points = codes
        axes = {"xlabel": "dimension 1", "ylabel": "dimension 2"}
    else:
        points = TSNE(2, perplexity=args.perplexity, random_state=args.seed).fit_transform(codes)
        text += f", {nearest_neighbor_accuracy(points, labels):.1%} on the map"
        axes = {"xticks": [], "yticks": []}  # they have no meaning: only which points are close has one
    figure = draw(points, labels, data.classes, f"{TITLES[args.codes]} of {len(codes):,} test images\n{text}")
    figure.axes[0].set(**axes)

    path = common.output_folder(args.out, args.run) / f"tsne_{args.codes}.png"
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"{args.codes}: {text}")
    if not config.autoencoder:
        used = dimensions_in_use(mean, log_var)
        print(f"{used} of the {mean.shape[1]} dimensions of z carry more than 0.01 nats ({len(x):,} test images)")
    print(path)


if __name__ == "__main__":
    main()
