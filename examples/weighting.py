"""Stream-R1's weighting in a DMD loop that is not ours: python examples/weighting.py [STEPS]

The student is a bidirectional generator of one step, as short as a DMD loop can be; models and reward are the
small world's. What is Stream-R1's are the lines between the two rulers.
"""

import copy
import sys

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from stream_r1 import StreamR1Weights
from stream_r1.models.autoencoders import load_autoencoder
from stream_r1.models.text import load_text_encoder
from stream_r1.places import locate
from stream_r1.rewards import load_reward
from stream_r1_kernels import dmd_loss

PROMPTS = ["a red ball bounces in a meadow at noon", "a blue star floats up by the sea at night"]


def predict(model: torch.nn.Module, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """x0 [B, F, C, h, w] from x_t, by the velocity that a Wan transformer gives."""
    v = model(x_t.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0].transpose(1, 2)
    return x_t - sigma.view(-1, 1, 1, 1, 1) * v


def main(steps: int) -> None:
    torch.manual_seed(0)
    teacher = WanTransformer3DModel.from_pretrained(locate("assets/tiny/teacher"), torch_dtype=torch.float32)
    teacher.requires_grad_(False)
    student, critic = (copy.deepcopy(teacher).requires_grad_() for _ in range(2))
    vae, encoder = load_autoencoder(locate("assets/tiny/vae")), load_text_encoder("minilm")
    text, negative = encoder.encode(PROMPTS).float(), encoder.encode(["", ""]).float()
    student_optimizer = torch.optim.AdamW(student.parameters(), 2e-5)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), 2e-5)
    weights = StreamR1Weights(load_reward(locate("assets/tiny/reward")), mode="full", beta=2.0)
    frames, rows, columns = 5, 8, 14

    for step in range(steps):
        noise = torch.randn(2, frames, teacher.config.in_channels, rows, columns)
        x = predict(student, noise, torch.ones(2), text)
        sigma = torch.rand(2) * 0.96 + 0.02
        at = sigma.view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            x_t = (1 - at) * x + at * torch.randn_like(x)
            real, uncond = predict(teacher, x_t, sigma, text), predict(teacher, x_t, sigma, negative)
            fake = predict(critic, x_t, sigma, text)
        # ----
        w = weights(vae.decode(x.detach()), PROMPTS, (frames, rows, columns))
        loss = dmd_loss(x, fake, real, uncond, guidance=0.5, w_inter=w.inter, w_intra=w.intra)
        # ----
        student_optimizer.zero_grad()
        loss.backward()
        student_optimizer.step()

        fresh = x.detach()
        x_t = (1 - at) * fresh + at * torch.randn_like(fresh)
        critic_loss = (predict(critic, x_t, sigma, text) - fresh).square().mean()
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        inter, scores = w.inter.tolist(), w.scores.mean(0).tolist()
        print(f"{step}: loss {loss.item():.3f}, critic {critic_loss.item():.3f}, {inter=}, {scores=}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
