"""The course: what there is to learn, in teaching order. All of tests/ follows this table.

Each test carries exactly one of these names as its marker, and `pytest -m router` runs one concept.

    concepts.py               this table; the plan of a course
    conftest.py               sorts the tests by concept, and prints a line per concept at the end
    test_*.py                 the tests, each of one claim; checks.py, forked.py and rules.py are
                              what several of them use: assertions, processes, two numbers
    make_assignment.py        copies the project without some functions, and writes the handout
    grade.py                  puts the bodies that students wrote into a copy, and runs its tests
    blanks.py                 takes functions apart by syntax tree, for these two
    mutants.py                mistakes, one line each, that the tests must notice
    test_assignment.py        tests of make_assignment.py and grade.py
    test_the_tests.py         breaks the project by mutants.py, or leaves concepts unwritten
    benchmark.py, study*      what is not the course: measurements, and the tables of .github

To add a concept, write

1. a row here, after all that it needs, and its line in PLAN;
2. docstrings of its functions that are enough to write them: they are the handout;
3. tests with its marker, by hand first. Mark those `edge` that a student may fail with the right
   numbers: a device, a loop over tokens, no tokens, NaN. They are graded apart;
4. likely mistakes in mutants.py, a line each, and the number of concepts in README.md.

Then `python -m pytest -q --slow -m course` says whether the tests notice the mistakes, fail without
the concept, and need no other than the row says. To move or rename a function, change its name here
and in mutants.py. To change a rule, see make_assignment.py.
"""

from typing import NamedTuple


class Concept(NamedTuple):
    name: str  # the marker of its tests
    functions: str  # that implement it, as file.function or file.Class.method
    needs: str  # concepts whose functions its tests call, directly (the indirect ones follow)
    lesson: str  # one line


CONCEPTS = (
    # ---- moe.py: the layer
    Concept("router", "moe.Router.__init__ moe.Router.forward", "",
            "A router scores every token against every expert, in float32 even where the rest is "
            "bfloat16."),
    Concept("top_k", "moe.top_k_gates", "",
            "Softmax over all experts first, then the k best, not renormalised: else a single "
            "gate would always be 1."),
    Concept("balance", "moe.cv_squared moe.importance_loss moe.load_loss moe.balance_loss", "",
            "Without a price on imbalance a few experts take everything; noise gives counting a "
            "gradient."),
    Concept("capacity", "moe.expert_capacity moe.assign_slots", "",
            "An expert has a limited number of slots: first choices go first, and what finds no "
            "slot is dropped."),
    Concept("dispatch", "moe.place_rows moe.dispatch", "",
            "Sort one row per token and choice by expert, so that each expert meets its own in "
            "one block."),
    Concept("combine", "moe.combine", "dispatch",
            "Gate times answer, summed: through this product the router learns, although top-k "
            "has no gradient."),
    Concept("experts",
            "moe.Experts.__init__ moe.Experts.forward moe.Experts.loop moe.compute_dtype", "",
            "E MLPs, each called on its own rows: an idle one gets a zero gradient, not a missing "
            "one."),
    Concept("layer",
            "moe.MoE.__init__ moe.MoE.forward moe.MoE.route",
            "router top_k balance capacity dispatch combine experts",
            "Route, assign, dispatch, experts, combine: seven lines, and with one expert the "
            "dense MLP."),
    # ---- vit.py and convnext.py: the models
    Concept("placement", "vit.place_moe convnext.place_moe", "",
            "Which blocks hold experts matters: the paper's ConvNeXts have them in the last two, "
            "its ViTs in every second."),
    Concept("building",
            "vit.ViT.__init__ vit.init_weights convnext.ConvNeXt.__init__ convnext.init_weights",
            "placement layer",
            "A sparse backbone is the dense one with other MLPs: same widths, same drop path, "
            "same start."),
    Concept("vit", "vit.Attention.forward vit.Block.forward vit.ViT.forward", "building",
            "Patches and a class token attend to each other, then each token meets its MLP or its "
            "experts alone."),
    Concept("convnext",
            "convnext.ChannelNorm.forward convnext.Block.forward convnext.ConvNeXt.forward",
            "building",
            "Each position of a feature map is a token; the sparse block keeps its convolution by "
            "one more skip."),
    Concept("grouped", "moe.Experts.grouped moe.Experts.use_grouped_mm", "vit convnext",
            "One kernel for all experts gives what the loop gives; no shape depends on the data, "
            "so it compiles."),
    Concept("costs", "moe.count_parameters moe.count_flops", "vit convnext",
            "Parameters grow with E, multiply-adds with k: the reason to be sparse."),
    Concept("weights",
            "train.upcycle train.experts_from_mlp vit.from_torchvision vit.resize_positions "
            "convnext.from_torchvision", "vit convnext",
            "With torchvision's weights we compute its function; upcycled, even with experts."),
    # ---- moe.py, its last section
    Concept("expert_choice",
            "moe.ExpertChoice.__init__ moe.ExpertChoice.forward",
            "router capacity experts costs weights",
            "Experts choose tokens: all have the same load, but a token may meet none."),
    Concept("soft",
            "moe.SoftMoE.__init__ moe.SoftMoE.forward", "top_k capacity experts costs weights",
            "Each expert answers mixtures of tokens: nothing is chosen, all is smooth."),
    # ---- eval.py: from images to a number
    Concept("shapes",
            "eval.TensorImages.__init__ eval.TensorImages.__getitem__ eval.open_drawn eval.paint "
            "eval.draw_shapes eval.draw_flags", "",
            "Pictures whose every factor is known: the same on every machine, and shifted to where "
            "training never was."),
    Concept("folders",
            "eval.FolderImages.__init__ eval.FolderImages.path eval.FolderImages.__getitem__ "
            "eval.open_folder eval.subfolder eval.find_images eval.hold_out eval.read_image "
            "eval.without_metadata eval.decode eval.together eval.download", "shapes",
            "A million files, odd names, broken images: what is on disk is read, or named."),
    Concept("counting",
            "eval.eval_transform eval.normalize eval.per_colour eval.best_dtype eval.auto_workers "
            "eval.eval_loader eval.predict eval.count eval.evaluate eval.image_losses "
            "eval.best_classes eval.mistakes eval.shield", "folders",
            "Each image counts once, at any batch size and any number of processes."),
    Concept("checkpoints", "eval.build_model eval.read_checkpoint eval.load_checkpoint", "vit",
            "A checkpoint says how to build its model, and is data: opening it runs nothing."),
    Concept("classes",
            "eval.match_classes eval.match_dataset eval.choose_split eval.read_real", "folders",
            "Robustness sets name their classes otherwise: match by name, predict among those "
            "found."),
    Concept("evaluator",
            "eval.change_routing eval.mute eval.open_parts eval.corruption_errors eval.prepare "
            "eval.measure eval.print_row eval.parse_args eval.main",
            "checkpoints counting classes costs expert_choice soft",
            "One table, several checkpoints and test sets; whatever deviates from training is "
            "printed."),
    # ---- train.py: from a recipe to a checkpoint
    Concept("recipe", "train.parse_args train.blocks train.recipe_of train.settle", "",
            "Published hyperparameters, overridden by flags, refused before any work when they "
            "cannot be."),
    Concept("optimizer",
            "train.learning_rate train.update_ema train.layer_group train.parameter_groups "
            "train.classification_loss train.make_mixer", "building",
            "Warm up, decay to the end, and do not let weight decay touch biases, norms and "
            "embeddings."),
    Concept("batches",
            "train.seed_draws train.train_transform train.Augmented.__getitem__ train.image_order",
            "recipe counting",
            "Every draw depends on seed, epoch and image alone: no generator state, the same at "
            "every world size."),
    Concept("training",
            "train.Run.__init__ train.open_data train.start_from train.claim_and_continue "
            "train.restore train.save train.train train.next_batch train.check_and_agree "
            "train.Meter.count train.Meter.summary train.validate train.main eval.watch_signals",
            "optimizer batches checkpoints costs weights grouped expert_choice soft",
            "Kill it, continue it, split it over processes: the same weights come out."),
    # ---- inspect_experts.py: what the experts do
    Concept("statistics",
            "inspect_experts.count_patches inspect_experts.entropy "
            "inspect_experts.mutual_information inspect_experts.similarity "
            "inspect_experts.cumulative inspect_experts.row_shares inspect_experts.top_classes "
            "inspect_experts.Layer.patches inspect_experts.store inspect_experts.known_factors "
            "inspect_experts.describe inspect_experts.surest_patches", "classes",
            "Count first choices as the images pass; mutual information says what the experts "
            "follow, chance what is noise."),
    Concept("report",
            "inspect_experts.inspect inspect_experts.palette "
            "inspect_experts.picture inspect_experts.panel inspect_experts.swatch "
            "inspect_experts.tiles inspect_experts.tint inspect_experts.overlay "
            "inspect_experts.cut_out inspect_experts.heat inspect_experts.bar inspect_experts.plot "
            "inspect_experts.draw_training inspect_experts.draw_balance "
            "inspect_experts.draw_pictures inspect_experts.draw_load inspect_experts.draw_where "
            "inspect_experts.draw_amount inspect_experts.draw_classes "
            "inspect_experts.draw_similarity inspect_experts.draw_surest "
            "inspect_experts.Layer.panel inspect_experts.parts_of inspect_experts.overview "
            "inspect_experts.report_html inspect_experts.routing_csv inspect_experts.write_files "
            "inspect_experts.print_run inspect_experts.parse_args inspect_experts.main",
            "statistics counting checkpoints expert_choice soft",
            "A page that says under each figure how to read it, and files that are whole or not "
            "there."),
    # ---- tests/ and README.md
    Concept("course", "", "",
            "A test that no mistake can fail teaches nothing; a command that fails teaches less."))
BY_NAME = {concept.name: concept for concept in CONCEPTS}


def functions_of(name):
    """Return the functions of a concept as pairs (file without .py, path in the file)."""
    return [tuple(function.split(".", 1)) for function in BY_NAME[name].functions.split()]


class Work(NamedTuple):
    hours: int  # an estimate: reading, writing, and the tests
    question: str  # to discuss, once the tests pass


PLAN = dict(
    router=Work(4, "Why are the scores float32 even under autocast? What would bfloat16 change?"),
    top_k=Work(1, "What would k = 1 teach the router if the gates were divided by their sum?"),
    balance=Work(4, "Counting has no gradient. Where does that of the load loss come from?"),
    capacity=Work(4, "Whom does Batch Prioritized Routing drop? When does it change nothing?"),
    dispatch=Work(3, "Why is no shape allowed to depend on the choices? What does it cost?"),
    combine=Work(2, "Give numbers where a gate falls although its expert was right."),
    experts=Work(2, "Why is an expert called on 0 rows? Who would wait for it otherwise?"),
    layer=Work(4, "Which lines see the noise, and which must not? What differs in evaluation?"),
    placement=Work(1, "The paper's ViTs take every second block, its ConvNeXts the last two. Why?"),
    building=Work(4, "Sparse and dense start alike. In which parts, and why does it matter?"),
    vit=Work(4, "What may a token learn from others, and in which lines?"),
    convnext=Work(4, "What is a token here? Why has the sparse block one skip more?"),
    grouped=Work(4, "Why does the last expert take in the dropped rows?"),
    costs=Work(3, "Which E and k have the cost of the dense model, and which its parameters?"),
    weights=Work(3, "After upcycling all experts are alike. What makes them differ later?"),
    expert_choice=Work(3, "All loads are equal by construction. Who pays for it?"),
    soft=Work(3, "Nothing is dropped and nothing is chosen. What is lost?"),
    shapes=Work(3, "Which factor could a model use as a shortcut, and how would you notice?"),
    folders=Work(8, "What is a broken image worth: an error, a warning, or a wrong prediction?"),
    counting=Work(5, "Why does the accuracy not depend on batch size and processes?"),
    checkpoints=Work(3, "What could a pickle file do when it is opened?"),
    classes=Work(4, "Why is a prediction made among the classes of the test set only?"),
    evaluator=Work(8, "Which of the table's numbers would change with another seed, and how much?"),
    recipe=Work(4, "Which mistake should stop a run before its first step?"),
    optimizer=Work(4, "Why do norms, biases and embeddings have no weight decay?"),
    batches=Work(4, "What must a random draw depend on, so that a continued run is the same run?"),
    training=Work(12, "What is in a checkpoint, and which part would you miss last?"),
    statistics=Work(8, "How much mutual information does chance give, and with how many images?"),
    report=Work(10, "Which figure could mislead, and what does its caption say against it?"))


def all_needs(name):
    """Return the names of all concepts that a concept needs, directly or indirectly."""
    found = set()
    for need in BY_NAME[name].needs.split():
        found |= {need} | all_needs(need)
    return found
