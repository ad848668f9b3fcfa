"""The VAE on several GPUs, or in several processes on a CPU, each with its share of every batch.

    torchrun --nproc_per_node 2 -m docs.parallel

Ten epochs at beta 1; after each the weights replace vae-parallel.pt in the current folder ("Your own weights" in
README.md opens them).
An Autoencoder needs DistributedDataParallel(model, find_unused_parameters=True): its log_var layer has no gradient.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, transforms

from vae import VAE, Decoder, Encoder, train_vae

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)  # before anything uses a GPU: each process has its own
dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank()

if rank == 0:
    datasets.MNIST("data", download=True)
dist.barrier()  # the others wait for the download
train_set = datasets.MNIST("data", transform=transforms.ToTensor())
sampler = DistributedSampler(train_set)  # each process gets its share of the images
loader = DataLoader(train_set, batch_size=1024 // dist.get_world_size(), sampler=sampler)

model = VAE(Encoder(784, 512, 128), Decoder(128, 512, 784)).to(device)
# Every process starts with the weights of rank 0. Gradients are means over the processes, not sums, so they are smaller
# than those of one process; Adam's update does not depend on their scale.
parallel = DistributedDataParallel(model)
optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-3)
torch.manual_seed(rank)  # each process draws its own epsilon
for epoch in range(10):
    sampler.set_epoch(epoch)  # another shuffle every epoch
    losses = torch.tensor(train_vae(parallel, optimizer, loader, beta=1), device=device)
    dist.all_reduce(losses)  # the sum over the processes; each has the mean of as many images
    reconstruction, kl, _ = (losses / dist.get_world_size()).tolist()
    if rank == 0:
        print(f"epoch {epoch + 1}: {reconstruction:.1f} + {kl:.1f} nats per image")
        torch.save(model.state_dict(), "vae-parallel.pt")
dist.destroy_process_group()
