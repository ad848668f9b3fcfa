"""t-SNE of what a VAE's encoder makes of the test images, coloured by class (van der Maaten and Hinton, 2008).

Without a run it takes the newest VAE under runs/. The number that goes with the picture is the
accuracy of the nearest neighbour: how often the closest other code has the same class.

    python tsne.py                                       # the means, as in the lab
    python tsne.py runs/vae-beta1 --codes std            # would the standard deviations do?
    python tsne.py runs/vae-beta1 --codes pixels         # and no encoder at all?
"""

import torch

import common
import vae


def codes_of(model, x, which):
    """What stands for each image of x (N, input_dim): its mean, sample or std (N, latent_dim), or its pixels."""
    mean, log_var = model.encoder(x)
    std = torch.exp(0.5 * log_var)
    return {"mean": mean, "sample": vae.reparameterize(mean, std), "std": std, "pixels": x}[which]


def nearest_neighbour_accuracy(codes, labels):
    """The share of codes (N, D) whose nearest other code has their label."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1).fit(codes).kneighbors(return_distance=False)[:, 0]
    return (labels[nearest] == labels).mean()


def draw(points, labels, classes, title):
    """A figure of points (N, 2), a colour a class."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab10" if len(classes) <= 10 else "gist_rainbow"].resampled(len(classes))
    for label, name in enumerate(classes):
        axes.scatter(*points[labels == label].T, s=12, color=colours(label), label=name)
    # distances and directions on the map have no unit and no meaning; only who is near whom has
    axes.set(title=title, xticks=[], yticks=[], aspect="equal")
    columns = 1 + (len(classes) - 1) // 25
    figure.legend(loc="outside right upper", fontsize="small" if columns == 1 else 5, ncols=columns)
    return figure


def new_parser():
    parser = common.new_parser("tsne.py", __doc__)
    parser.add_argument("run", nargs="?", help="a run's folder or a checkpoint (default: the newest VAE under runs/)")
    add = parser.add_argument_group("map").add_argument
    codes = ["mean", "sample", "std", "pixels"]
    perplexity = common.between(float, 1, 10**6)
    add("--codes", choices=codes, default="mean", help="what stands for an image (default: mean)")
    add("--n", type=common.between(int, 3), default=1000, metavar="N", help="test images (default: 1000)")
    add(
        "--perplexity", type=perplexity, default=30.0, metavar="P", help="about how many neighbours count (default: 30)"
    )
    common.add_data_options(parser, "the run's own", "the run's own", "the run's folder")
    return parser


@common.one_line_errors("tsne.py")
@torch.inference_mode()
def main(argv=None):
    options = new_parser().parse_args(argv)
    device = common.pick_device(options.device)
    path = common.find_checkpoint(options.run, "vae")
    if common.load_checkpoint(path)["model"] == "dcgan":
        raise common.Error(f"{path} holds a GAN, which has no encoder to give codes of images; name a VAE", 2)
    model, config = vae.load(path, device)
    folder = common.picture_folder(options.out, path)
    if config["autoencoder"] and options.codes in ("sample", "std"):
        raise common.Error(f"--codes {options.codes}: an autoencoder has no variance; use mean or pixels", 2)
    data = common.images_for(options, config)
    n = min(options.n, len(data.test))
    if options.perplexity >= n:
        raise common.Error(f"--perplexity must be below the number of images, {n}", 2)

    torch.manual_seed(options.seed)
    chosen = torch.randperm(len(data.test))[:n]
    x = data.test[chosen].to(device).flatten(1) / 255
    codes = codes_of(model, x, options.codes).cpu().numpy()
    labels = data.test_labels[chosen].numpy()

    from sklearn.manifold import TSNE

    init = "pca" if codes.shape[1] > 1 else "random"
    tsne = TSNE(2, perplexity=options.perplexity, init=init, random_state=options.seed % 2**32)
    points = tsne.fit_transform(codes)
    accuracies = [nearest_neighbour_accuracy(x, labels) for x in (codes, points)]
    text = "1-nearest-neighbour accuracy {:.1%} of the codes, {:.1%} of the map".format(*accuracies)
    picture = folder / f"tsne_{options.codes}.png"
    common.save_figure(picture, draw(points, labels, data.classes, f"{options.codes} of {n} test images\n{text}"))
    print(f"{options.codes}: {text}\n{picture}")


if __name__ == "__main__":
    main()
