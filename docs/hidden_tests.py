"""Hidden tests of the seven functions that students write.

    python -m pytest -q docs/hidden_tests.py        # of our own functions

student_version.py puts each test into the notebook, below the check of its function. There it tests what the student
has written in place of what is imported here from vae and dcgan; the loops are tested with our losses.
"""

import copy

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from dcgan import discriminator_loss, generator_loss, train_dcgan
from vae import VAE, Decoder, Encoder, kl_divergence, reconstruction_loss, reparameterize, train_vae

device = torch.device("cpu")  # the notebook's may be a GPU


def compare(name, yours, right, tolerance=1e-3):
    """Assert that two numbers or tensors agree; the message shows where they differ most."""
    yours = torch.as_tensor(yours).detach().cpu()
    right = torch.as_tensor(right).detach().cpu()
    assert yours.shape == right.shape, f"{name}: yours has the shape {tuple(yours.shape)}, right {tuple(right.shape)}"
    excess = (yours - right).abs() - tolerance * (1 + right.abs())
    worst = excess.argmax()
    message = f"{name}: yours {yours.flatten()[worst]:.4g}, right {right.flatten()[worst]:.4g}"
    assert excess.flatten()[worst] <= 0, message


def compare_gradients(loss, right):
    """Compare the gradients of the loss with the right ones, {name: (parameter, gradient)}."""
    assert loss.requires_grad, f"the loss has no gradient for {', '.join(right)}"
    gradients = torch.autograd.grad(loss, [parameter for parameter, _ in right.values()], materialize_grads=True)
    for yours, (name, (_, gradient)) in zip(gradients, right.items()):
        compare(f"gradient for {name}", yours, gradient)


def test_reparameterize():
    mean = torch.randn(3, device=device).repeat(20_000, 1).requires_grad_()
    std = torch.tensor([0.3, 1.0, 4.0], device=device).repeat(20_000, 1).requires_grad_()
    z = reparameterize(mean, std)
    assert z.dtype == mean.dtype, f"yours {z.dtype}, right {mean.dtype}"
    epsilon = ((z - mean) / std).detach()
    compare("mean of epsilon", epsilon.mean(0), torch.zeros(3), tolerance=0.05)
    compare("covariance of epsilon", epsilon.T.cov(), torch.eye(3), tolerance=0.05)
    compare("mean of epsilon ** 4", (epsilon**4).mean(), 3.0, tolerance=0.1)
    assert not torch.equal(z, reparameterize(mean, std)), "two calls give the same z, right new noise in each"
    compare_gradients(z.sum(), {"mean": (mean, torch.ones_like(mean)), "std": (std, epsilon)})


def test_reconstruction_loss():
    x_pred = (0.1 + 0.8 * torch.rand(5, 12, device=device)).requires_grad_()
    x = torch.rand(5, 12, device=device)
    loss = reconstruction_loss(x_pred, x)
    compare("loss", loss, -(x * x_pred.log() + (1 - x) * (1 - x_pred).log()).sum())
    compare_gradients(loss, {"x_pred": (x_pred, (x_pred - x) / (x_pred * (1 - x_pred)))})


def test_kl_divergence():
    mean = torch.randn(5, 7, device=device, requires_grad=True)
    log_var = torch.randn(5, 7, device=device, requires_grad=True)
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = kl_divergence(mean, log_var)
    compare("KL", kl, torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum())
    compare_gradients(kl, {"mean": (mean, mean), "log_var": (log_var, (log_var.exp() - 1) / 2)})


def test_generator_loss():
    fake_score = (0.1 + 0.8 * torch.rand(6, 1, device=device)).requires_grad_()
    g_loss = generator_loss(fake_score)
    compare("loss of G", g_loss, -fake_score.log().mean())
    compare_gradients(g_loss, {"fake_score": (fake_score, -1 / fake_score / 6)})


def test_discriminator_loss():
    real_score = (0.1 + 0.8 * torch.rand(6, 1, device=device)).requires_grad_()
    fake_score = (0.1 + 0.8 * torch.rand(6, 1, device=device)).requires_grad_()
    d_loss = discriminator_loss(real_score, fake_score)
    compare("loss of D", d_loss, -(real_score.log().mean() + (1 - fake_score).log().mean()) / 2)
    right = {"real_score": (real_score, -1 / real_score / 12), "fake_score": (fake_score, 1 / (1 - fake_score) / 12)}
    compare_gradients(d_loss, right)


class Recorder(nn.Module):
    """A network that keeps what it was given."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach())
        return self.network(x)


def compare_direction(name, after, before, losses):
    """Assert that the update of a network went against the gradient of one of the losses of the network before it."""
    update = parameters_to_vector(after.parameters()) - parameters_to_vector(before.parameters())
    cosines = []
    for loss in losses:
        gradient = parameters_to_vector(torch.autograd.grad(loss, before.parameters(), retain_graph=True))
        cosines.append(torch.cosine_similarity(update, -gradient, dim=0).item())
    assert max(cosines) > 0.999, f"update of {name}: its cosine with the right direction is {max(cosines):.4f}, right 1"


def test_train_vae():
    model = VAE(Encoder(784, 16, 20), Recorder(Decoder(20, 16, 784))).to(device)
    images = torch.rand(11, 1, 28, 28) * torch.linspace(0, 1, 11).view(11, 1, 1, 1)  # from dark to bright
    dataset = TensorDataset(images, torch.arange(11) % 10)
    x = images.to(device).flatten(1)
    nn.init.constant_(model.encoder.mean.bias, 1)
    nn.init.normal_(model.decoder.network.backbone[0].weight)  # z matters
    nn.init.constant_(model.decoder.network.backbone[-1].bias, -1)  # a bright image costs more than a dark one

    # the means over the images, of a model that stays as it is and whose decoder ignores z
    still = copy.deepcopy(model).eval()
    nn.init.zeros_(still.decoder.network.backbone[0].weight)
    x_pred, mean, log_var = still(x)
    reconstruction = reconstruction_loss(x_pred, x).item() / 11
    kl = kl_divergence(mean, log_var).item() / 11
    optimizer = torch.optim.SGD(still.parameters(), lr=0)
    yours = train_vae(still, optimizer, DataLoader(dataset, batch_size=4), 0.5)
    right = [reconstruction, kl, reconstruction + 0.5 * kl]
    compare("reconstruction, KL or loss", [float(number) for number in yours], right)
    assert still.training, "the model is in eval mode, right train mode"

    # the direction of an update, and of a second one: no gradient may be left over from the first
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for beta in (30, 3):
        before = copy.deepcopy(model)
        model.decoder.inputs.clear()
        train_vae(model, optimizer, DataLoader(dataset, batch_size=11), beta)
        mean, log_var = before.encoder(x)
        std = torch.exp(0.5 * log_var)
        epsilon = ((model.decoder.inputs[0] - mean) / std).detach()
        compare("standard deviation of epsilon", epsilon.std(), 1.0, tolerance=0.2)
        x_pred = before.decoder.network(mean + std * epsilon)
        loss = reconstruction_loss(x_pred, x) + beta * kl_divergence(mean, log_var)
        compare_direction("the encoder", model.encoder, before.encoder, [loss])
        compare_direction("the decoder", model.decoder, before.decoder, [loss])


def test_train_dcgan():
    generator = Recorder(nn.Sequential(nn.Linear(20, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))).to(device)
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid()).to(device)
    images = torch.rand(9, 1, 4, 4)
    dataset = TensorDataset(images, torch.arange(9))
    x = images.to(device)

    # the numbers of each batch, of networks that stay as they are and where all fakes are alike
    still = copy.deepcopy(generator).eval()
    nn.init.zeros_(still.network[0].weight)
    with torch.no_grad():
        discriminator[3].bias -= discriminator[:4](x).mean()  # some images pass for real
    fake_score = discriminator(still.network(torch.zeros(1, 20, device=device)))
    right = []
    for real_score in discriminator.eval()(x).split(4):
        fakes = fake_score.expand_as(real_score)
        losses = [generator_loss(fakes), discriminator_loss(real_score, fakes)]
        right.append(torch.stack([*losses, (real_score > 0.5).float().mean(), (fakes <= 0.5).float().mean()]))
    optimizers = [torch.optim.SGD(network.parameters(), lr=0) for network in (still, discriminator)]
    steps = train_dcgan(still, discriminator, *optimizers, DataLoader(dataset, batch_size=4), 20)
    compare("g_loss, d_loss, real_acc or fake_acc", steps, torch.stack(right))
    assert still.training and discriminator.training, "a network is in eval mode, right train mode"

    # the direction of both updates, and of a second one: no gradient may be left over from the first
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (generator, discriminator)]
    for _ in range(2):
        g_before = copy.deepcopy(generator)
        d_before = copy.deepcopy(discriminator)
        generator.inputs.clear()
        train_dcgan(generator, discriminator, *optimizers, DataLoader(dataset, batch_size=9), 20)
        g_losses = []
        d_losses = []
        for z in generator.inputs:
            assert z.shape == (9, 20), f"z: yours has the shape {tuple(z.shape)}, right (9, 20)"
            compare("standard deviation of z", z.std(0).mean(), 1.0, tolerance=0.2)
            for d in (d_before, discriminator):  # G may be trained before D, or after it
                g_losses.append(generator_loss(d(g_before.network(z))))
            for g in (g_before, generator):  # and D with the fakes of G before its update, or after it
                d_losses.append(discriminator_loss(d_before(x), d_before(g.network(z).detach())))
        compare_direction("G", generator, g_before, g_losses)
        compare_direction("D", discriminator, d_before, d_losses)
