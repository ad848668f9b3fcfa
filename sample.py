"""Pictures from a trained VAE or DCGAN: samples, interpolations, reconstructions.

Without a run it takes the newest under runs/. Lightning checkpoints of the lab open as well.

    python sample.py                                     # of the newest run
    python sample.py runs/vae-beta10 --images 0 2        # from the first training image to the third
    python sample.py runs/dcgan --n 64 --slerp --seed 7
"""

import torch

import common
import dcgan
import vae


def interpolate(z1, z2, steps):
    """Codes on the straight line from z1 to z2, (latent_dim,) each: alpha = 0, ..., 1; (steps, latent_dim)."""
    alpha = torch.linspace(0, 1, steps, device=z1.device)[:, None]
    return (1 - alpha) * z1 + alpha * z2


def slerp(z1, z2, steps):
    """The same along an arc (Shoemake, 1985).

    Gaussian codes of many dimensions lie near a sphere, and the middle of a straight line between
    two of them lies inside it, where the decoder saw none in training.
    """
    omega = torch.arccos(torch.cosine_similarity(z1, z2, dim=0).clamp(-1, 1))
    if omega.sin() < 1e-6:  # one direction, or opposite ones: no arc is the shortest
        return interpolate(z1, z2, steps)
    alpha = torch.linspace(0, 1, steps, device=z1.device)[:, None]
    return (torch.sin((1 - alpha) * omega) * z1 + torch.sin(alpha * omega) * z2) / torch.sin(omega)


def show(paths):
    from matplotlib import pyplot

    if pyplot.get_backend().lower() == "agg":  # what matplotlib falls back to
        raise common.Error("--show: no window can be opened here; the pictures are in the files named above")
    for path in paths:
        pyplot.figure(path.name)
        pyplot.imshow(pyplot.imread(path))
        pyplot.axis("off")
    pyplot.show()


def new_parser():
    parser = common.new_parser("sample.py", __doc__)
    parser.add_argument("run", nargs="?", help="a run's folder or a checkpoint (default: the newest under runs/)")
    add = parser.add_argument_group("pictures").add_argument
    add("--n", type=common.count, default=24, metavar="N", help="samples, in rows of 8 (default: 24)")
    add("--steps", type=common.count, default=11, metavar="N", help="of an interpolation (default: 11)")
    add("--slerp", action="store_true", help="along an arc: Gaussian codes lie near a sphere (default: straight)")
    add(
        "--images",
        type=common.between(int, 0, 10**9),
        nargs=2,
        default=[0, 2],
        metavar=("I", "J"),
        help="training images to interpolate between, VAE only (default: 0 2)",
    )
    add("--show", action="store_true", help="open a window too (default: no)")
    common.add_data_options(parser, "the run's own", "the run's own", "the run's folder")
    return parser


@common.one_line_errors("sample.py")
@torch.inference_mode()
def main(argv=None):
    options = new_parser().parse_args(argv)
    device = common.pick_device(options.device)
    path = common.find_checkpoint(options.run)
    kind = common.load_checkpoint(path)["model"]
    model, config = (vae if kind == "vae" else dcgan).load(path, device)
    folder = common.picture_folder(options.out, path)
    path_between = slerp if options.slerp else interpolate
    paths = []

    def decode(z):
        return model.decoder(z).unflatten(1, config["image_shape"]) if kind == "vae" else model["generator"](z)

    def write(name, images, columns):
        paths.append(folder / name)
        common.save_grid(paths[-1], images.cpu(), columns)
        print(paths[-1])

    z = common.fixed_codes(options.n + 2, config["latent_dim"], options.seed).to(device)
    write("samples.png", decode(z[2:]), 8)
    write("interpolation.png", decode(path_between(z[0], z[1], options.steps)), options.steps)

    if kind == "vae":
        data = common.images_for(options, config)
        if max(options.images) >= len(data.train):
            raise common.Error(f"--images: {data.name} has {len(data.train)} training images, counted from 0", 2)
        originals = data.train[options.images].to(device) / 255
        codes, _ = model.encoder(originals.flatten(1))
        between = decode(path_between(codes[0], codes[1], options.steps))
        tiles = torch.cat([originals[:1], between, originals[1:]])
        write("interpolation_digits.png", tiles, len(tiles))

        x = data.test[:50].to(device) / 255
        mean, _ = model.encoder(x.flatten(1))
        write("reconstructions.png", common.pairs(x, decode(mean)), 10)
    if options.show:
        show(paths)


if __name__ == "__main__":
    main()
