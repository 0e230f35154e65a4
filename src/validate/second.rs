//! A second engine's reading of what was inserted: tract types and runs the
//! selection sub-graphs and has to choose the same tokens.

use ndarray::Array2;

use super::decoders::decoder_scope;
use super::reference::grid_tensor;
use super::report::Report;
use super::scenario::{Frame, Scenario, Seeded, lay_out, standard};
use super::{Options, ValidateError, probe};
use crate::arch::{Decoder, Layout, PatchRows, Projection, Role, VisionTower, Vlm};
use crate::ir::cone::ancestors;
use crate::ir::{DataType, Dim, Model, ValueId, ValueType, extract, verify};
use crate::onnx::serialize;
use crate::passes::{Pruning, Recipe, TokenMerge};
use crate::runtime::{DType, Session, Tensor, Value, lay_out_pixels};

/// A value of an inserted sub-graph: its name, rank and element type.
struct Port {
    name: String,
    rank: usize,
    dtype: DataType,
}

fn port(name: impl Into<String>, rank: usize, dtype: DataType) -> Port {
    Port {
        name: name.into(),
        rank,
        dtype,
    }
}

/// Checks the merge and every drop point of one variant.
///
/// # Errors
/// The model cannot be opened or run with ONNX Runtime.
#[allow(clippy::too_many_arguments, reason = "one call site")]
pub(super) fn check(
    base: &Vlm,
    rewritten: &Vlm,
    recipe: &Recipe,
    variant: &str,
    label: &str,
    options: &Options,
    report: &mut Report,
) -> Result<(), ValidateError> {
    let mut rng = Seeded::new(options.seed ^ 0x7ac7);
    for (old, new) in base.parts.iter().zip(&rewritten.parts) {
        if old.variant != variant {
            continue;
        }
        // Several graphs of one kind are told apart by what they are of.
        let kin = base
            .decoders()
            .filter(|(i, _)| base.parts[*i].variant == variant);
        let label = match &old.role {
            Role::Decoder(_) if kin.count() > 1 => &format!("{label}{}: ", old.label()),
            Role::Vision(tower) if tower.video => &format!("{label}clips: "),
            _ => label,
        };
        let (tower, decoder) = match &old.role {
            Role::Vision(tower) => (Some(tower.as_ref()), None),
            Role::Decoder(decoder) => (None, Some(decoder.as_ref())),
            Role::Whole(whole) => (Some(&whole.tower), Some(&whole.decoder)),
            Role::Embedding(_) | Role::Encoder(_) | Role::Unknown(_) => continue,
        };
        let whole = match &old.role {
            Role::Whole(whole) => Some(super::whole::feed(
                &old.model, &new.model, whole, recipe, &mut rng,
            )?),
            _ => None,
        };
        let models = (&old.model, &new.model);
        if let Some(tower) = tower
            && new.model.find("duet/token_merge/merged_tokens").is_some()
            && let Some(feed) = match &whole {
                Some(feed) => Some(feed.clone()),
                None if tower.rows.is_some() => {
                    rows_feed(&old.model, tower, recipe.pass::<TokenMerge>(), &mut rng)?
                }
                None => tower_feed(&old.model, tower, &mut rng)?,
            }
        {
            tower_check(models, tower, &feed, label, options, report)?;
        }
        if let (Some(tower), Some(pass)) = (tower, recipe.encoder_pass())
            && recipe.pass::<TokenMerge>().is_none()
            && let Some(feed) = match &whole {
                Some(feed) => Some(feed.clone()),
                None => tower_feed(&old.model, tower, &mut rng)?,
            }
        {
            selection_check(models, tower, pass.name(), &feed, label, options, report)?;
        }
        let pruning = recipe.pruning();
        let placed = recipe.placed(base);
        if let Some(decoder) = decoder.filter(|_| pruning.is_some() || placed) {
            let feed = match whole {
                Some(feed) => feed,
                None => decoder_feed(&old.model, &new.model, decoder, placed, &mut rng)?,
            };
            if placed {
                gone_check(models, decoder, pruning, &feed, label, options, report)?;
            }
            if let Some(pruning) = pruning {
                let of = (pruning, placed);
                decoder_check(models, decoder, of, &feed, label, options, report)?;
            }
        }
    }
    Ok(())
}

/// The merge of one tower.
fn tower_check(
    (old, new): (&Model, &Model),
    tower: &VisionTower,
    feed: &[(String, Tensor)],
    label: &str,
    options: &Options,
    report: &mut Report,
) -> Result<(), ValidateError> {
    let name = |v: ValueId| old.name(v).to_owned();
    let check = format!("{label}tract: token_merge");
    if let Some(rows) = &tower.rows {
        let (inputs, outputs) = row_ports(old, tower, rows);
        return compare(new, &inputs, &outputs, feed, &check, options, report);
    }
    let mut inputs = vec![port(name(tower.hidden), 3, tower.dtype)];
    if tower.shuffle.is_some() {
        inputs.push(port(name(tower.entry), 3, tower.dtype));
    }
    for operand in [&tower.site.query, &tower.site.key] {
        for (value, rank, dtype) in operand.reads(old, tower.dtype) {
            if inputs.iter().all(|p| p.name != name(value)) {
                inputs.push(port(name(value), rank, dtype));
            }
        }
    }
    for (value, rank, dtype) in tower.site.mask_reads(old) {
        inputs.push(port(name(value), rank, dtype));
    }
    let outputs = [port("duet/token_merge/merged_tokens", 3, tower.dtype)];
    compare(new, &inputs, &outputs, feed, &check, options, report)
}

/// What the pass `pass` keeps of one tower's tokens.
fn selection_check(
    (old, new): (&Model, &Model),
    tower: &VisionTower,
    pass: &str,
    feed: &[(String, Tensor)],
    label: &str,
    options: &Options,
    report: &mut Report,
) -> Result<(), ValidateError> {
    let named = |what: &str| format!("duet/{pass}/{what}");
    let indices = named("kept_indices");
    let (input, output) = if new.find(&indices).is_some() {
        // Features that are no output any more have the name of what was put in their place.
        let inner = named("kept_tokens:inner");
        let features = match new.find(&inner) {
            Some(_) => inner,
            None => old.name(tower.features).to_owned(),
        };
        let ty = old.value(tower.features).ty.as_ref();
        let dtype = ty.and_then(ValueType::dtype).unwrap_or(tower.dtype);
        let rank = ty.and_then(|t| t.shape()).map_or(3, <[_]>::len);
        (
            port(features, rank, dtype),
            port(indices, 2, DataType::Int64),
        )
    } else {
        let entry = port(old.name(tower.entry), 3, tower.dtype);
        (entry, port(named("kept_tokens"), 3, tower.dtype))
    };
    let check = format!("{label}tract: {pass}");
    compare(new, &[input], &[output], feed, &check, options, report)
}

/// Borders of the merge behind a tower of patch rows.
fn row_ports(old: &Model, tower: &VisionTower, rows: &PatchRows) -> (Vec<Port>, Vec<Port>) {
    let name = |v: ValueId| old.name(v).to_owned();
    // The features that it merges are no output any more.
    let mut inputs = vec![port("duet/token_merge/features:inner", 2, tower.dtype)];
    let mut add = |value: ValueId, rank: usize, dtype: DataType| {
        if inputs.iter().all(|p| p.name != name(value)) {
            inputs.push(port(name(value), rank, dtype));
        }
    };
    for (laid, operand) in [
        (&rows.query, &tower.site.query),
        (&rows.key, &tower.site.key),
    ] {
        match laid {
            Some(laid) => add(laid.value, laid.axes.len(), rows.dtype),
            None => {
                for (value, rank, dtype) in operand.reads(old, rows.dtype) {
                    add(value, rank, dtype);
                }
            }
        }
    }
    for (value, rank, dtype) in tower.site.mask_reads(old) {
        add(value, rank, dtype);
    }
    for step in &rows.moves {
        add(step.indices, if step.nd { 2 } else { 1 }, DataType::Int64);
    }
    let outputs = vec![
        port("duet/token_merge/merged_tokens", 3, tower.dtype),
        port("duet/token_merge/kept_indices", 2, DataType::Int64),
    ];
    (inputs, outputs)
}

/// Patches of one image and their grid.
fn rows_feed(
    model: &Model,
    tower: &VisionTower,
    merge: Option<&TokenMerge>,
    rng: &mut Seeded,
) -> Result<Option<Vec<(String, Tensor)>>, ValidateError> {
    let Some((grid, width)) = super::rows::sample(model, tower, merge) else {
        return Ok(None);
    };
    let kind = |v: ValueId| model.value(v).ty.as_ref().and_then(ValueType::dtype);
    let stated = kind(tower.pixels).unwrap_or(DataType::Float);
    let pixels = super::rows::noise(grid, width, rng)?.cast_float(dtype(stated))?;
    let mut feed = vec![(model.name(tower.pixels).to_owned(), pixels)];
    if let Some(input) = tower.rows.as_ref().and_then(|r| r.grid) {
        let short = kind(input) == Some(DataType::Int32);
        feed.push((model.name(input).to_owned(), grid_tensor(grid, short)?));
    }
    Ok(Some(feed))
}

/// Pixels of two images, or of one where the file takes no more; nothing if their size is not
/// fixed.
fn tower_feed(
    model: &Model,
    tower: &VisionTower,
    rng: &mut Seeded,
) -> Result<Option<Vec<(String, Tensor)>>, ValidateError> {
    let ty = model.value(tower.pixels).ty.as_ref();
    let Some(frame) = Frame::of(model, tower) else {
        return Ok(None);
    };
    let [_, h, w] = frame.size;
    let images = frame.at_once(2);
    let rank = ty.and_then(|t| t.shape()).map_or(4, <[_]>::len);
    let pixels = lay_out_pixels(frame.pixels(images, rng), rank)?;
    let stated = ty.and_then(ValueType::dtype).unwrap_or(DataType::Float);
    let pixels = pixels.cast_float(dtype(stated))?;
    let mut feed = vec![(model.name(tower.pixels).to_owned(), pixels)];
    // A mask of padded pixels, where the model takes one.
    let others = model.graph().inputs.iter().copied();
    let given = |v: &ValueId| *v != tower.pixels && model.value(*v).initializer.is_none();
    for other in others.filter(given) {
        let kind = model.value(other).ty.as_ref().and_then(ValueType::dtype);
        let mask = rng.masks(images, h, w).mapv(i64::from);
        let mask = match kind {
            Some(DataType::Bool) => Tensor::from(mask.mapv(|m| m != 0)),
            _ => Tensor::from(mask),
        };
        feed.push((model.name(other).to_owned(), mask));
    }
    Ok(Some(feed))
}

/// Where discarded tokens leave.
fn gone_check(
    (old, new): (&Model, &Model),
    decoder: &Decoder,
    pruning: Option<Pruning<'_>>,
    feed: &[(String, Tensor)],
    label: &str,
    options: &Options,
    report: &mut Report,
) -> Result<(), ValidateError> {
    let scope = decoder_scope(pruning);
    let boundary = decoder.layers[1].boundary.iter();
    let mut inputs: Vec<Port> = boundary
        .map(|v| port(old.name(*v), 3, decoder.dtype))
        .collect();
    inputs.push(port(format!("{scope}/entry/gone_mask"), 2, DataType::Bool));
    let outputs = drop_outputs(new, &format!("{scope}/drop0"), decoder.dtype);
    let check = format!("{label}tract: discarded tokens");
    compare(new, &inputs, &outputs, feed, &check, options, report)
}

/// What a drop point gives: the tokens that stay, and their hidden states. (Of a boundary of several
/// values the first may be a norm, of which nothing is read once the ranking has its projections.)
fn drop_outputs(model: &Model, scope: &str, dtype: DataType) -> [Port; 2] {
    let mut hidden = ["hidden", "hidden_2"].map(|n| format!("{scope}/{n}"));
    if model.find(&hidden[0]).is_none() {
        hidden.swap(0, 1);
    }
    let [hidden, _] = hidden;
    [
        port(format!("{scope}/kept_indices"), 2, DataType::Int64),
        port(hidden, 3, dtype),
    ]
}

/// Every drop point of one decoder.
fn decoder_check(
    (old, new): (&Model, &Model),
    decoder: &Decoder,
    (pruning, placed): (Pruning<'_>, bool),
    feed: &[(String, Tensor)],
    label: &str,
    options: &Options,
    report: &mut Report,
) -> Result<(), ValidateError> {
    let Pruning { pass, prune } = pruning;
    for drop in 1..=prune.drops.len() {
        let scope = format!("duet/{pass}/drop{drop}");
        let after = prune.drops[drop - 1].after_layer;
        let layer = &decoder.layers[after];
        let ranks = &decoder.layers[prune.rank_layer.at(after)];
        // Discarded tokens leave there too, before the others.
        let entered = match placed && drop == 1 && prune.drops[0].after_layer == 1 {
            true => ["hidden", "hidden_2"]
                .map(|n| format!("duet/{pass}/drop0/{n}"))
                .to_vec(),
            false => layer
                .boundary
                .iter()
                .map(|v| old.name(*v).to_owned())
                .collect(),
        };
        let rank = |projection: &Projection| match projection.layout {
            Layout::Heads => 4,
            Layout::Rows { .. } => 3,
        };
        let mut inputs = vec![
            port(format!("{scope}/query"), rank(&ranks.query), decoder.dtype),
            port(format!("{scope}/key"), rank(&ranks.new_key), decoder.dtype),
            port(format!("duet/{pass}/entry/visual_mask"), 2, DataType::Bool),
            port(format!("duet/{pass}/entry/real_mask"), 2, DataType::Bool),
            port(format!("duet/{pass}/entry/text_mask"), 2, DataType::Bool),
        ];
        let entered = entered.into_iter().filter(|n| new.find(n).is_some());
        inputs.extend(entered.map(|n| port(n, 3, decoder.dtype)));
        if placed {
            let gone = format!("duet/{pass}/entry/gone_mask");
            inputs.push(port(gone, 2, DataType::Bool));
        }
        // Which tokens there are is the outcome of all drop points before.
        for earlier in usize::from(!placed)..drop {
            inputs.push(port(
                format!("duet/{pass}/drop{earlier}/kept_indices"),
                2,
                DataType::Int64,
            ));
        }
        if decoder.ids.is_some() {
            // Sizes are read off them.
            inputs.push(port(old.name(decoder.embeds), 3, decoder.dtype));
        }
        let outputs = drop_outputs(new, &scope, decoder.dtype);
        let check = format!("{label}tract: drop point {drop}");
        compare(new, &inputs, &outputs, feed, &check, options, report)?;
    }
    Ok(())
}

/// A prompt with an image, for the rewritten decoder's own inputs.
fn decoder_feed(
    base: &Model,
    model: &Model,
    decoder: &Decoder,
    placed: bool,
    rng: &mut Seeded,
) -> Result<Vec<(String, Tensor)>, ValidateError> {
    // A batch, padded if the model takes padding; one row where it takes no more.
    let all = standard(8, 1);
    let one = super::numeric::fixed(base, decoder.embeds, 0) == Some(1);
    let fits = |s: &&Scenario| match s.turns[0].rows.len() {
        1 => one,
        rows => !one && rows == 2 && s.padded() == decoder.takes_padding(),
    };
    let Some(scenario) = all.iter().find(fits) else {
        return Err(ValidateError::Model("no scenario fits the decoder".into()));
    };
    let layout = lay_out(&scenario.turns[0], &[24, 24]);
    let (b, l) = layout.ids.dim();
    let mut feed = Vec::new();
    for &input in &model.graph().inputs {
        let value = model.value(input);
        // A weight that is an input too, as older exporters list them.
        if value.initializer.is_some() {
            continue;
        }
        let shape = value.ty.as_ref().and_then(|t| t.shape()).unwrap_or(&[]);
        let known = |axis: usize| shape.get(axis).and_then(Dim::known).map(|n| n as usize);
        let name = value.name.as_str();
        let stated = value.ty.as_ref().and_then(ValueType::dtype);
        let declared = match stated {
            Some(DataType::Int32) => Some(DType::I32),
            Some(DataType::Bool) => Some(DType::Bool),
            Some(DataType::Float) => Some(DType::F32),
            _ => None,
        };
        let integers = |values: Array2<i64>| Tensor::from(values).as_declared(declared);
        let tensor = if name == base.name(decoder.embeds) {
            let width = known(2).unwrap_or(1);
            let marked = decoder.width.is_some_and(|w| w as usize + 1 == width);
            Tensor::from(ndarray::Array3::from_shape_fn(
                (b, l, width),
                |(r, i, d)| match (marked && d + 1 == width, layout.visual[[r, i]]) {
                    // Rows differ in how many are discarded.
                    (true, true) if placed && (i + r).is_multiple_of(2 + r) => 2.0,
                    (true, true) => 1.0,
                    (true, false) => 0.0,
                    _ => rng.normal(),
                },
            ))
            .cast_float(dtype(decoder.dtype))?
        } else if Some(name) == decoder.attention_mask.map(|v| base.name(v)) {
            integers(layout.mask.clone())
        } else if Some(name) == decoder.position_ids.map(|v| base.name(v)) {
            let before = |r: usize, i: usize| layout.mask.row(r).iter().take(i).sum::<i64>();
            match decoder.position_rows {
                None => integers(Array2::from_shape_fn((b, l), |(r, i)| before(r, i))),
                // Rows that differ, so that one does not pass for another.
                Some(rows) => ndarray::Array3::from_shape_fn((rows, b, l), |(p, r, i)| {
                    before(r, i) / (p as i64 + 1)
                })
                .into(),
            }
        } else if name == crate::passes::VISUAL_MASK_INPUT {
            Tensor::from(layout.visual.clone())
        } else if name == crate::passes::SALIENT_MASK_INPUT {
            Tensor::from(Array2::from_elem((b, l), false))
        } else {
            let (heads, width) = (decoder.kv_heads as usize, decoder.head_dim as usize);
            let dims = [b, known(1).unwrap_or(heads), 0, known(3).unwrap_or(width)];
            Tensor::zeros(dtype(decoder.dtype), dims)?
        };
        feed.push((name.to_owned(), tensor));
    }
    Ok(feed)
}

pub(super) fn dtype(dtype: DataType) -> DType {
    match dtype {
        DataType::Float16 => DType::F16,
        DataType::Bfloat16 => DType::BF16,
        DataType::Double => DType::F64,
        _ => DType::F32,
    }
}

/// Runs the whole model with ONNX Runtime, looking at the sub-graph's borders,
/// then the sub-graph alone with tract.
fn compare(
    model: &Model,
    inputs: &[Port],
    outputs: &[Port],
    feed: &[(String, Tensor)],
    check: &str,
    options: &Options,
    report: &mut Report,
) -> Result<(), ValidateError> {
    let resolve = |ports: &[Port]| -> Option<Vec<(ValueId, ValueType)>> {
        ports
            .iter()
            .map(|p| {
                Some((
                    model.find(&p.name)?,
                    ValueType::tensor(p.dtype, vec![Dim::Unknown; p.rank]),
                ))
            })
            .collect()
    };
    let (Some(all), Some(wanted)) = (resolve(inputs), resolve(outputs)) else {
        report.add(
            check,
            false,
            "the inserted values are not in the graph under their names",
        );
        return Ok(());
    };
    // What the sub-graph reads besides: sizes of graph inputs.
    let stop: Vec<ValueId> = all.iter().map(|(v, _)| *v).collect();
    let needed = needed_inputs(model, &wanted, &stop);
    let mut borders: Vec<(ValueId, ValueType)> = all
        .into_iter()
        .filter(|(v, _)| needed.contains(v))
        .collect();
    for &input in &model.graph().inputs {
        if needed.contains(&input) && !stop.contains(&input) {
            borders.push((
                input,
                model
                    .value(input)
                    .ty
                    .clone()
                    .unwrap_or(ValueType::tensor(DataType::Float, vec![])),
            ));
        }
    }
    let mut probes: Vec<ValueId> = borders.iter().chain(&wanted).map(|(v, _)| *v).collect();
    probes.retain(|v| !model.graph().inputs.contains(v));
    let probed = probe::with_outputs(model, &probes)?;
    let opened = probe::open_rewritten(&probed, check, &options.session);
    let Some(mut session): Option<Session> = report.opened(&format!("{check}: "), opened)? else {
        return Ok(());
    };
    let values: Vec<(String, Value)> = feed
        .iter()
        .map(|(n, t)| Ok((n.clone(), Value::new(t.clone())?)))
        .collect::<Result<_, ValidateError>>()?;
    let named: Vec<(&str, &Value)> = values.iter().map(|(n, v)| (n.as_str(), v)).collect();
    let first = match session.run(&named) {
        Ok(outputs) => outputs,
        // (The scenarios have run the unmodified model.)
        Err(error) => {
            let problem = ValidateError::Rewritten(error);
            report.add(check, false, problem.to_string());
            return Ok(());
        }
    };
    let mut given = Vec::new();
    for (value, _) in &borders {
        let name = model.name(*value);
        let tensor = match feed.iter().find(|(n, _)| n == name) {
            Some((_, tensor)) => tensor.clone(),
            None => first.get(name)?.to_tensor()?,
        };
        given.push((name, tensor));
    }
    // A file need not say what rank its masks have; the run does.
    for ((_, ty), (_, tensor)) in borders.iter_mut().zip(&given) {
        if let (Some(dtype), true) = (
            ty.dtype(),
            ty.shape().is_none_or(|s| s.len() != tensor.shape().len()),
        ) {
            *ty = ValueType::tensor(dtype, vec![Dim::Unknown; tensor.shape().len()]);
        }
    }
    let part = extract(model, &borders, &wanted)?;
    let bytes = serialize(verify(&part)?).to_vec();
    let second = match crate::runtime::tract::run_once(&bytes, &given) {
        Ok(outputs) => outputs,
        Err(error) => {
            report.add(check, false, error.to_string());
            return Ok(());
        }
    };
    let (mut ok, mut detail) = (true, Vec::new());
    for ((value, _), (_, found)) in wanted.iter().zip(&second) {
        let name = model.name(*value);
        let want = first.get(name)?.to_tensor()?;
        let short = name.rsplit('/').next().unwrap_or(name);
        if want.dtype().is_float() {
            let worst = want
                .f32s()?
                .iter()
                .zip(found.f32s()?.iter())
                .map(|(a, b)| f64::from((a - b).abs()))
                .fold(0.0, f64::max);
            let same_shape = want.shape() == found.shape();
            let limit = if want.dtype() == DType::F32 {
                1e-4
            } else {
                2e-2
            };
            ok &= same_shape && worst <= limit;
            detail.push(format!("{short} {:?} within {worst:.1e}", found.shape()));
        } else {
            let same = want.shape() == found.shape() && want.i64s()? == found.i64s()?;
            ok &= same;
            detail.push(format!("{short} {}", if same { "equal" } else { "differ" }));
        }
    }
    report.add(check, ok, detail.join(", "));
    Ok(())
}

/// Values that the wanted ones depend on, not looking behind `stop`.
fn needed_inputs(
    model: &Model,
    wanted: &[(ValueId, ValueType)],
    stop: &[ValueId],
) -> std::collections::HashSet<ValueId> {
    let mut seen = std::collections::HashSet::new();
    let mut stack: Vec<ValueId> = wanted.iter().map(|(v, _)| *v).collect();
    while let Some(value) = stack.pop() {
        if !seen.insert(value) || stop.contains(&value) {
            continue;
        }
        if let Some(node) = model.producer_node(value) {
            stack.extend(node.inputs.iter().flatten());
        }
    }
    debug_assert!(seen.is_subset(&ancestors(
        model,
        &wanted.iter().map(|(v, _)| *v).collect::<Vec<_>>(),
        false
    )));
    seen
}
