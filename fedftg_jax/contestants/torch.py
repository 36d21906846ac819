"""PyTorch, one client after another, as a careful user would write it.

The data are on the device, with images channels-last; one model is loaded anew
for every client, and the mean is accumulated in place. The server step computes
only gradients that it uses.
"""

import os

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedftg_jax.contestants import workloads

PACKAGES = ('torch',)


def device():
  """Chooses the device and its settings."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if not torch.cuda.is_available():
    return 'cpu'
  torch.set_float32_matmul_precision('high')  # TF32, as ours by default
  torch.backends.cudnn.benchmark = True
  return 'cuda'


def autocast(workload, where):
  """Lets layers compute in bfloat16, if the workload asks for it."""
  return torch.autocast(where, torch.bfloat16, enabled=workload.bfloat16)


def finish():
  """Waits for the device."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()


class MLP(nn.Sequential):
  """784, 200, 200, classes, with ReLU."""

  def __init__(self):
    super().__init__(
      nn.Flatten(),
      nn.Linear(784, 200),
      nn.ReLU(),
      nn.Linear(200, 200),
      nn.ReLU(),
      nn.Linear(200, workloads.NUM_CLASSES),
    )


class SmallCNN(nn.Sequential):
  """conv3x3x32, conv3x3x64 (both without padding), pool, fc128, fc."""

  def __init__(self):
    super().__init__(
      nn.Conv2d(3, 32, 3),
      nn.ReLU(),
      nn.Conv2d(32, 64, 3),
      nn.MaxPool2d(2),
      nn.ReLU(),
      nn.Flatten(),
      nn.Linear(14 * 14 * 64, 128),
      nn.ReLU(),
      nn.Linear(128, workloads.NUM_CLASSES),
    )


class FedAvgCNN(nn.Sequential):
  """conv5x5x64, pool, conv5x5x64, pool, fc384, fc192, fc."""

  def __init__(self):
    super().__init__(
      nn.Conv2d(3, 64, 5, padding=2),
      nn.MaxPool2d(2),
      nn.ReLU(),
      nn.Conv2d(64, 64, 5, padding=2),
      nn.MaxPool2d(2),
      nn.ReLU(),
      nn.Flatten(),
      nn.Linear(8 * 8 * 64, 384),
      nn.ReLU(),
      nn.Linear(384, 192),
      nn.ReLU(),
      nn.Linear(192, workloads.NUM_CLASSES),
    )


class NIIDCNN(nn.Sequential):
  """conv5x5x6, pool, conv5x5x16, pool (without padding), fc120, fc84, fc."""

  def __init__(self):
    super().__init__(
      nn.Conv2d(1, 6, 5),
      nn.MaxPool2d(2),
      nn.ReLU(),
      nn.Conv2d(6, 16, 5),
      nn.MaxPool2d(2),
      nn.ReLU(),
      nn.Flatten(),
      nn.Linear(4 * 4 * 16, 120),
      nn.ReLU(),
      nn.Linear(120, 84),
      nn.ReLU(),
      nn.Linear(84, workloads.NUM_CLASSES),
    )


class Block(nn.Module):
  """A residual block of two 3 x 3 convolutions."""

  def __init__(self, before, width, stride):
    super().__init__()
    self.body = nn.Sequential(
      nn.Conv2d(before, width, 3, stride, 1, bias=False),
      nn.BatchNorm2d(width),
      nn.ReLU(),
      nn.Conv2d(width, width, 3, 1, 1, bias=False),
      nn.BatchNorm2d(width),
    )
    self.skip = nn.Sequential()
    if stride != 1 or before != width:
      self.skip = nn.Sequential(
        nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
      )

  def forward(self, x):
    return functional.relu(self.body(x) + self.skip(x))


class ResNet18(nn.Sequential):
  """torchvision's ResNet-18, with the ImageNet stem."""

  def __init__(self):
    blocks, before = [], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
      blocks += [Block(before, width, stride), Block(width, width, 1)]
      before = width
    super().__init__(
      nn.Conv2d(3, 64, 7, 2, 3, bias=False),
      nn.BatchNorm2d(64),
      nn.ReLU(),
      nn.MaxPool2d(3, 2, 1),
      *blocks,
      nn.AdaptiveAvgPool2d(1),
      nn.Flatten(),
      nn.Linear(512, workloads.NUM_CLASSES),
    )


MODELS = {
  'mlp': MLP,
  'small_cnn': SmallCNN,
  'fedavg_cnn': FedAvgCNN,
  'niid_cnn': NIIDCNN,
  'resnet18': ResNet18,
}


class Generator(nn.Module):
  """The generator of FedFTG's official code."""

  def __init__(self, workload):
    super().__init__()
    height, width, channels = workload.image_shape
    features = workloads.GENERATOR_WIDTH
    self.shape = features, height // 4, width // 4
    size = int(np.prod(self.shape))
    self.from_noise = nn.Linear(workloads.NOISE_DIM, size)
    self.from_label = nn.Linear(workloads.NUM_CLASSES, size)
    self.body = nn.Sequential(
      nn.BatchNorm2d(2 * features),
      nn.Upsample(scale_factor=2),
      nn.Conv2d(2 * features, 2 * features, 3, padding=1),
      nn.BatchNorm2d(2 * features),
      nn.LeakyReLU(0.2, inplace=True),
      nn.Upsample(scale_factor=2),
      nn.Conv2d(2 * features, features, 3, padding=1),
      nn.BatchNorm2d(features),
      nn.LeakyReLU(0.2, inplace=True),
      nn.Conv2d(features, channels, 3, padding=1),
      nn.Tanh(),
      nn.BatchNorm2d(channels, affine=False),
    )

  def forward(self, z, labels):
    one_hot = functional.one_hot(labels, workloads.NUM_CLASSES).float()
    maps = [
      layer(v).view(-1, *self.shape)
      for layer, v in ((self.from_noise, z), (self.from_label, one_hot))
    ]
    return self.body(
      torch.cat(maps, 1).contiguous(memory_format=torch.channels_last)
    )


def tensors(workload, where):
  """Puts the clients' images, channels first, and labels on the device."""
  x, y = workloads.examples(workload)
  x = torch.from_numpy(x).to(where).permute(0, 1, 4, 2, 3)
  return x, torch.from_numpy(y).long().to(where)


def prepare(workload):
  where = device()
  if workload.iterations:
    return server_step(workload, where)
  x, y = tensors(workload, where)
  model = MODELS[workload.model]().to(where)
  if workload.model != 'mlp':
    model = model.to(memory_format=torch.channels_last)
  model.train()
  current = [v.detach().clone() for v in model.state_dict().values()]

  def train(x, y):
    optimizer = torch.optim.SGD(model.parameters(), workloads.LEARNING_RATE)
    for rows in torch.randperm(len(y), device=where).split(workload.batch_size):
      optimizer.zero_grad()
      with autocast(workload, where):
        loss = functional.cross_entropy(model(x[rows]), y[rows])
      loss.backward()
      optimizer.step()

  def round_():
    mean = [torch.zeros_like(v, dtype=torch.float) for v in current]
    for k in range(workload.cohort):
      with torch.no_grad():
        for own, received in zip(model.state_dict().values(), current):
          own.copy_(received)
      train(x[k], y[k])
      with torch.no_grad():
        for total, own in zip(mean, model.state_dict().values()):
          total.add_(own, alpha=1 / workload.cohort)
    for old, new in zip(current, mean):
      old.copy_(new)
    finish()

  return round_


def server_step(workload, where):
  """Prepares FedFTG's server step.

  It uses the official losses, with one generator step per teacher.
  """
  if workload.server_step != 'official':
    raise NotImplementedError(f'no server step {workload.server_step}')
  size, num_teachers = workload.batch_size, workload.cohort
  nets = [
    MODELS[workload.model]().to(where).to(memory_format=torch.channels_last)
    for _ in range(num_teachers + 1)
  ]
  student, *teachers = nets
  for teacher in teachers:
    teacher.requires_grad_(False)
  generator = (
    Generator(workload).to(where).to(memory_format=torch.channels_last)
  )
  alpha = torch.full((num_teachers, size), 1 / num_teachers, device=where)

  def diversity(z, images):
    flat = images.flatten(1)
    apart = (flat[None] - flat[:, None]).abs().mean(2)
    noise = (z[None] - z[:, None]).square().mean(2)
    return torch.exp(-(apart * noise).mean())

  def round_():
    optimizer = torch.optim.Adam(generator.parameters(), 0.01)
    student_optimizer = torch.optim.SGD(
      student.parameters(), 0.1, weight_decay=1e-3
    )
    for _ in range(workload.iterations):
      z = torch.randn(size, workloads.NOISE_DIM, device=where)
      labels = torch.randint(workloads.NUM_CLASSES, (size,), device=where)
      student.requires_grad_(False)
      generator.train()
      for teacher, weight in zip(teachers, alpha):
        optimizer.zero_grad()
        with autocast(workload, where):
          images = generator(z, labels)
          says, truth = student(images), teacher(images)
          gap = (says - truth.detach()).abs().mean(1)
          loss = (
            -(gap * weight).mean()
            + functional.cross_entropy(truth, labels) * weight.mean()
            + diversity(z, images) / num_teachers
          )
        loss.backward()
        optimizer.step()
      student.requires_grad_(True)
      with torch.no_grad(), autocast(workload, where):
        generator.eval()
        images = generator(z, labels)
        target = sum(
          teacher(images).softmax(1) * weight[:, None]
          for teacher, weight in zip(teachers, alpha)
        )
      for _ in range(workloads.STUDENT_STEPS):
        student_optimizer.zero_grad()
        with autocast(workload, where):
          loss = (-target * student(images).log_softmax(1)).mean()
        loss.backward()
        student_optimizer.step()
    finish()

  return round_
