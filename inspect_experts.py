"""What does each expert do? Run a sparse checkpoint over a data set and count who was sent where, class by class.

    python inspect_experts.py runs/convnext_nano-shapes-1/best.pt --data shapes --out inspect

Writes DIR/routing.csv (layer, block, class, expert, tokens, share of the class's tokens) and DIR/summary.json (per MoE
layer: load, experts used per image, mutual information of class and expert, router entropy, similarity of experts),
after "Mixture of Experts for Image Classification: What's the Sweet Spot?", section 5.6. As there, a token counts
for its first choice. Counting is done as the images pass by: memory does not grow with their number.
"""

import argparse
import csv
import json
import os
import sys

import torch
from tqdm import tqdm

from eval import (auto_workers, eval_loader, eval_transform, load_checkpoint, match_classes, normalize, open_dataset)


class LayerCounts:
    """Running sums of one MoE layer over the images seen so far; E experts."""

    def __init__(self, num_classes, num_experts):
        self.images = 0
        self.by_class = torch.zeros(num_classes, num_experts, dtype=torch.float64)  # tokens
        self.experts_used = 0.0  # summed over images: distinct experts
        self.entropy = 0.0  # summed over tokens, bits
        self.both = torch.zeros(num_experts, num_experts, dtype=torch.float64)  # see similarity()
        self.either = torch.zeros(num_experts, num_experts, dtype=torch.float64)

    def add(self, routing, labels):
        """Count a batch: a Routing of T = B * N tokens, image by image, and labels (B,)."""
        B, E = len(labels), routing.probs.shape[1]
        first = routing.experts[:, 0].view(B, -1).cpu()  # (B, N)
        per_image = (first.unsqueeze(2) == torch.arange(E)).sum(1).double()  # (B, E) tokens of each image per expert
        self.images += B
        self.by_class.index_add_(0, labels, per_image)
        self.experts_used += (per_image > 0).sum().item()
        self.entropy += torch.special.entr(routing.probs).sum().item() / torch.log(torch.tensor(2.0)).item()
        ci, cj = per_image.unsqueeze(2), per_image.unsqueeze(1)  # (B, E, 1), (B, 1, E)
        total = ci + cj
        self.both += torch.where((ci > 0) & (cj > 0), total - (ci - cj).abs(), 0.0).sum(0)
        self.either += total.sum(0)

    def summary(self):
        """The numbers of this layer, plain values for JSON."""
        tokens = self.by_class.sum()
        share = self.by_class.sum(0) / tokens  # (E,)
        information, normalized = mutual_information(self.by_class)
        return dict(
            share=share.tolist(), coefficient_of_variation=(share.std(correction=0) / share.mean()).item(),
            experts_per_image=self.experts_used / self.images, class_information_bits=information,
            class_information_normalized=normalized, router_entropy_bits=self.entropy / tokens.item(),
            similarity=similarity(self.both, self.either).tolist())


def mutual_information(counts):
    """(bits, normalised) that knowing the row says about the column, from a table of counts (rows, columns).

    I = sum p(r, c) log2( p(r, c) / (p(r) p(c)) ); normalised by the smaller of the two entropies: 1 if one decides the
    other, 0 if they have nothing to do with each other (or if there is nothing to know).
    """
    p = counts / counts.sum()
    entropies = [torch.special.entr(p.sum(axis)).sum() for axis in (0, 1)]  # nats
    information = sum(entropies) - torch.special.entr(p).sum()
    bits = information.item() / torch.log(torch.tensor(2.0)).item()
    return max(0.0, bits), max(0.0, (information / min(entropies)).item()) if min(entropies) > 0 else 0.0


def similarity(both, either):
    """Jaccard-like similarity of experts (E, E), paper section 5.6, from sums over the images.

    With c_i the tokens an image sends to expert i: both adds c_i + c_j - |c_i - c_j| where both appear, either adds
    c_i + c_j where one or both do. 1 on the diagonal, 0 for experts that never share an image or never appear.
    """
    return torch.where(either > 0, both / either.clamp(min=1), 0.0)


@torch.no_grad()
def count_routing(model, loader, device, mean, std, num_classes):
    """Run the model over the loader: one LayerCounts per MoE layer."""
    layers = None
    for images, labels, unreadable in tqdm(loader, desc="inspect", unit="batch", leave=False, disable=None):
        if (unreadable >= 0).any():
            raise ValueError(f"cannot read {loader.dataset.path(int(unreadable.max()))}: repair or remove the file")
        _, routings = model(normalize(images.to(device), mean, std), return_routing=True)
        layers = layers or [LayerCounts(num_classes, routing.probs.shape[1]) for routing in routings]
        for layer, routing in zip(layers, routings):
            layer.add(routing, labels)
    return layers


def write_csv(path, blocks, classes, layers):
    """routing.csv: for every layer, class and expert the tokens, and their share of the class's tokens."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("layer", "block", "class", "expert", "tokens", "share"))
        for i, (block, layer) in enumerate(zip(blocks, layers)):
            shares = layer.by_class / layer.by_class.sum(1, keepdim=True).clamp(min=1)
            for name, counts, class_shares in zip(classes, layer.by_class.tolist(), shares.tolist()):
                for expert, (count, share) in enumerate(zip(counts, class_shares)):
                    rows.writerow((i, block, name, expert, int(count), f"{share:.6f}"))


def parse_args():
    parser = argparse.ArgumentParser(description="Show what each expert of a sparse checkpoint does.")
    parser.add_argument("checkpoint", help="a file such as runs/convnext_nano-shapes-1/best.pt")
    parser.add_argument("--data", required=True, help="shapes, cifar10, cifar100 or a folder")
    parser.add_argument("--split", choices=("train", "val", "all"), default="all",
                        help="of a folder without val/: all of it, or the fifth that training holds out (default: all)")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--batch-size", type=int, default=128, help="images at a time (default: 128)")
    parser.add_argument("--workers", type=int, help="processes that load images (default: 0 if in memory, else up to 12)")
    return parser.parse_args()


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint = load_checkpoint(args.checkpoint, device)
    if not model.moe_blocks:
        raise ValueError(f"{args.checkpoint} is a dense model, it has no experts to inspect: train one with --moe-layers last2")
    dataset = open_dataset(args.data, args.split, eval_transform(checkpoint["image_size"], checkpoint["crop_ratio"]))
    match_classes(dataset.classes, checkpoint["classes"])
    workers = auto_workers(dataset) if args.workers is None else args.workers
    loader = eval_loader(dataset, args.batch_size, workers, device)
    layers = count_routing(model, loader, device, checkpoint["mean"], checkpoint["std"], len(dataset.classes))

    os.makedirs(args.out, exist_ok=True)
    write_csv(os.path.join(args.out, "routing.csv"), model.moe_blocks, dataset.classes, layers)
    summaries = [dict(layer=i, block=block) | layer.summary() for i, (block, layer) in enumerate(zip(model.moe_blocks, layers))]
    with open(os.path.join(args.out, "summary.json"), "w") as file:
        json.dump(dict(checkpoint=args.checkpoint, model=checkpoint["config"], data=args.data, images=len(dataset),
                       torch=torch.__version__, layers=summaries), file, indent=1)
    print(f"{'block':>5}  {'experts per image':>17}  {'class information':>17}  share of tokens per expert, %")
    for s in summaries:
        print(f"{s['block']:>5}  {s['experts_per_image']:>17.2f}  {s['class_information_normalized']:>17.3f}  "
              + " ".join(f"{100 * share:5.1f}" for share in s["share"]))
    print(f"written to {args.out}/: routing.csv, summary.json")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
