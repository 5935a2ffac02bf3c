"""Tables that the notebooks show."""

import systems

from mrilib.tables import parameter_table


def test_each_part_of_the_encoder_has_its_own_row(phantom_dir, tmp_path):
    backbone = systems.write_backbone(tmp_path)
    config = systems.stage1_config(phantom_dir, backbone)
    added = {"finding_labels": ["Mass"], "finding_chans": 2}
    plain, system = (systems.build(config.model_copy(update=update)) for update in ({}, added))
    table, short = (parameter_table(one)["parameters"].str.replace(",", "").astype(int) for one in (system, plain))
    parts = table[[name for name in table.index if name.startswith("encoder: ")]]
    assert parts.sum() == table["encoder"] == sum(p.numel() for p in system.encoder.parameters())
    assert set(table.index) - set(short.index) == {"encoder: maps of findings"}
    assert short["encoder: VarNet"] == parts["encoder: VarNet"]
