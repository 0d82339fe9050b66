"""Watching a training run: numbers, sample videos and the reward's maps, to files, TensorBoard and wandb.

with Watcher(trainer, recipe.watch, folder) as watcher:
    for event in trainer.run():
        watcher.see(event)
"""
