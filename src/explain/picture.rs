//! The picture: a panel for each stage, in it the images as the encoder sees them.
//!
//! Tokens that are left are as bright as in the image. A contextual token's anchor is framed in a colour of its own, and
//! the tokens merged into it are tinted with it. Everything else is dimmed.

use std::collections::BTreeMap;
use std::ops::Range;

use super::ExplainError;
use super::canvas::{Canvas, Colour, LETTER, LINE, hue, mixed};
use super::places::{Explanation, Kept, Stage, Unit};
use crate::runtime::{Pixels, image::Resample};

const PAPER: Colour = [255, 255, 255];
const INK: Colour = [20, 22, 28];
const GREY: Colour = [90, 94, 104];
/// What dimmed patches fade into.
const SLATE: Colour = [58, 64, 82];

/// Space between panels, and around them.
const MARGIN: usize = 14;
/// Space between the images of a panel.
const GAP: usize = 4;
/// A row of panels is no wider, unless one is.
const WIDE: usize = 1700;

/// Longest edge of an image in a panel that shows so many.
fn edge(units: usize) -> usize {
    match units {
        0..=1 => 392,
        2..=4 => 224,
        _ => 168,
    }
}

/// How a token of the encoder looks.
#[derive(Clone, Copy, PartialEq)]
enum Look {
    Clear,
    Anchor(Colour),
    Member(Colour),
}

/// An image in a panel: where, and what of it.
struct Frame {
    unit: usize,
    x: usize,
    y: usize,
    pixels: Pixels,
}

/// Draws an explanation. `title` are the lines above it, the first of them bold.
///
/// # Errors
/// The tokens of an image are no grid, or there are so many images that the picture would be too large.
pub fn draw(explanation: &Explanation, title: &[String]) -> Result<Vec<u8>, ExplainError> {
    let (frames, [width, height]) = sheet(explanation)?;
    let captions: Vec<[String; 3]> = explanation
        .stages
        .iter()
        .map(|stage| caption(explanation, stage))
        .collect();
    let letters = captions.iter().flatten().map(|line| line.chars().count());
    let panel = [
        width.max(letters.max().unwrap_or(0) * LETTER),
        height + 3 * LINE + 4,
    ];
    let across = ((WIDE - MARGIN) / (panel[0] + MARGIN)).clamp(1, explanation.stages.len().max(1));
    let down = explanation.stages.len().div_ceil(across);
    let full = MARGIN + across * (panel[0] + MARGIN);
    let lines: Vec<(String, bool)> = title
        .iter()
        .enumerate()
        .flat_map(|(i, line)| {
            let broken = broken(line, (full - 2 * MARGIN) / LETTER);
            broken.into_iter().map(move |part| (part, i == 0))
        })
        .collect();
    let top = MARGIN + lines.len() * LINE + if lines.is_empty() { 0 } else { MARGIN / 2 };
    let mut canvas = Canvas::new(full, top + down * (panel[1] + MARGIN), PAPER)?;
    for (i, (line, bold)) in lines.iter().enumerate() {
        canvas.text(MARGIN, MARGIN + i * LINE, line, *bold, INK);
    }
    for (i, (stage, caption)) in explanation.stages.iter().zip(&captions).enumerate() {
        let x = MARGIN + i % across * (panel[0] + MARGIN);
        let y = top + i / across * (panel[1] + MARGIN);
        for (line, text) in caption.iter().enumerate() {
            let colour = if line == 0 { INK } else { GREY };
            canvas.text(x, y + line * LINE, text, line == 0, colour);
        }
        let looks = looks(explanation, stage);
        for frame in &frames {
            let own = looks.as_ref().map(|all| &all[frame.unit]);
            let at = (x + frame.x, y + 3 * LINE + 4 + frame.y);
            paint(&mut canvas, &explanation.units[frame.unit], frame, own, at)?;
        }
    }
    png(&canvas)
}

/// What a stage is called, which layers see it, and what it has.
fn caption(explanation: &Explanation, stage: &Stage) -> [String; 3] {
    let head = stage.name();
    let head = head.unwrap_or_else(|| "all tokens of the encoder".into());
    let layers = match stage.layers {
        None => "no layer sees them".to_owned(),
        Some(layers) if layers.last == Some(layers.first) => format!("layer {}", layers.text()),
        Some(layers) => format!("layers {}", layers.text()),
    };
    let counts = explanation.counts(stage, None);
    let count = match stage.tokens {
        None => format!("{} tokens", counts.total()),
        Some(_) => format!("{}: {}", counts.total(), counts.text()),
    };
    [head, count, layers]
}

/// The images of a panel, and its size.
fn sheet(explanation: &Explanation) -> Result<(Vec<Frame>, [usize; 2]), ExplainError> {
    let most = edge(explanation.units.len());
    let mut frames = Vec::new();
    let (mut width, mut y) = (0, 0);
    for visual in &explanation.visuals {
        let mut x = 0;
        let mut high = 0;
        let mut row = 0;
        for unit in visual.units.clone() {
            let Unit {
                pixels, row: own, ..
            } = &explanation.units[unit];
            if *own != row {
                (x, y, high, row) = (0, y + high + GAP, 0, *own);
            }
            let pixels = scaled(pixels, most)?;
            let (w, h) = (pixels.width(), pixels.height());
            frames.push(Frame { unit, x, y, pixels });
            x += w + GAP;
            high = high.max(h);
            width = width.max(x - GAP);
        }
        y += high + 2 * GAP;
    }
    Ok((frames, [width, y.saturating_sub(2 * GAP)]))
}

/// An image at a size that shows its patches: small ones by whole numbers, so that patches stay sharp.
fn scaled(pixels: &Pixels, most: usize) -> Result<Pixels, ExplainError> {
    let long = pixels.width().max(pixels.height());
    let (width, height) = match most / long {
        0 => {
            let side = |n: usize| (n * most / long).max(1);
            (side(pixels.width()), side(pixels.height()))
        }
        times => (pixels.width() * times, pixels.height() * times),
    };
    let how = match long > most {
        true => Resample::Bicubic,
        false => Resample::Nearest,
    };
    Ok(pixels.resize(width, height, how)?)
}

/// How each token of each unit looks at a stage; `None` is as it is.
fn looks(explanation: &Explanation, stage: &Stage) -> Option<Vec<BTreeMap<usize, Look>>> {
    stage.tokens.as_ref()?;
    let mut looks = vec![BTreeMap::new(); explanation.units.len()];
    for (number, choice) in explanation.choices.iter().enumerate() {
        let mut set = |place: usize, look: Look| {
            let unit = choice.unit + place / choice.plane.max(1);
            if let Some(own) = looks.get_mut(unit) {
                own.insert(place % choice.plane.max(1), look);
            }
        };
        let Some(Kept {
            dominant,
            contextual,
        }) = explanation.left(stage, number)
        else {
            continue;
        };
        let all = choice.kept.as_ref().map(|kept| &kept.contextual);
        let colour = |anchor: usize| {
            let place = all.and_then(|all| all.iter().position(|c| c.anchor == anchor));
            // Steps of the golden ratio: neighbours in the list differ most.
            hue((place.unwrap_or(0) as f32 * 0.618_034).fract())
        };
        for cluster in &contextual {
            for &member in &cluster.members {
                set(member, Look::Member(colour(cluster.anchor)));
            }
        }
        dominant.iter().for_each(|place| set(*place, Look::Clear));
        for cluster in &contextual {
            set(cluster.anchor, Look::Anchor(colour(cluster.anchor)));
        }
    }
    Some(looks)
}

/// One image of a panel.
fn paint(
    canvas: &mut Canvas,
    unit: &Unit,
    frame: &Frame,
    looks: Option<&BTreeMap<usize, Look>>,
    (left, top): (usize, usize),
) -> Result<(), ExplainError> {
    let pixels = &frame.pixels;
    let (width, height) = (pixels.width(), pixels.height());
    let at = |x: usize, y: usize| -> Colour {
        let at = (y * width + x) * 3;
        std::array::from_fn(|c| pixels.rgb()[at + c])
    };
    let Some(looks) = looks else {
        for y in 0..height {
            (0..width).for_each(|x| canvas.set(left + x, top + y, at(x, y)));
        }
        return Ok(());
    };
    let Some([rows, columns, edge]) = unit.grid else {
        return Err(ExplainError::Picture(format!(
            "the tokens of an image of {}×{} are no grid of rows and columns, so they cannot be drawn; --json without \
             --out tells which they are",
            unit.pixels.width(),
            unit.pixels.height()
        )));
    };
    for y in 0..height {
        for x in 0..width {
            let colour = at(x, y);
            let grey = colour.iter().map(|c| u16::from(*c)).sum::<u16>() / 3;
            let grey = [u8::try_from(grey).unwrap_or(u8::MAX); 3];
            canvas.set(left + x, top + y, mixed(grey, SLATE, 0.72));
        }
    }
    // Patches in pixels of the panel.
    let span = |from: usize, shown: usize, of: usize| -> Range<usize> {
        from * edge * shown / of..((from + 1) * edge * shown / of).min(shown)
    };
    for (&place, &look) in looks {
        let (row, column) = (place / columns, place % columns);
        if row >= rows {
            continue;
        }
        let ys = span(row, height, unit.pixels.height());
        let xs = span(column, width, unit.pixels.width());
        for y in ys.clone() {
            for x in xs.clone() {
                let shown = match look {
                    Look::Clear | Look::Anchor(_) => at(x, y),
                    Look::Member(tint) => mixed(mixed(at(x, y), SLATE, 0.45), tint, 0.4),
                };
                canvas.set(left + x, top + y, shown);
            }
        }
        if let Look::Anchor(colour) = look {
            let thick = (xs.len().min(ys.len()) / 8).clamp(1, 4);
            let shifted = |of: &Range<usize>, by: usize| of.start + by..of.end + by;
            canvas.outline(shifted(&xs, left), shifted(&ys, top), thick, colour);
        }
    }
    Ok(())
}

/// A line in parts of at most `width` letters, broken at spaces where there are some.
fn broken(line: &str, width: usize) -> Vec<String> {
    let width = width.max(8);
    let mut parts = vec![String::new()];
    for word in line.split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        for piece in letters.chunks(width) {
            let last = parts.last().map_or(0, |p| p.chars().count());
            let space = usize::from(last > 0);
            if last + space + piece.len() > width {
                parts.push(String::new());
            }
            if let Some(part) = parts.last_mut() {
                if !part.is_empty() {
                    part.push(' ');
                }
                part.extend(piece);
            }
        }
    }
    parts
}

fn png(canvas: &Canvas) -> Result<Vec<u8>, ExplainError> {
    use image::codecs::png::{CompressionType, FilterType, PngEncoder};
    use image::{ExtendedColorType, ImageEncoder};
    let failed = |e: &dyn std::fmt::Display| ExplainError::Picture(format!("writing the PNG: {e}"));
    let side = |n: usize| u32::try_from(n).map_err(|e| failed(&e));
    let (width, height) = (side(canvas.width())?, side(canvas.height())?);
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Best, FilterType::Adaptive)
        .write_image(canvas.rgb(), width, height, ExtendedColorType::Rgb8)
        .map_err(|e| failed(&e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_at_spaces() {
        assert_eq!(broken("one two three", 8), ["one two", "three"]);
        assert_eq!(broken("abcdefghijkl m", 8), ["abcdefgh", "ijkl m"]);
        assert_eq!(broken("", 8), [""]);
    }

    #[test]
    fn small_images_grow_by_whole_numbers_and_large_ones_shrink() {
        let size = |w: usize, h: usize| {
            let pixels = Pixels::new(w, h, vec![0; w * h * 3]).unwrap();
            let scaled = scaled(&pixels, 392).unwrap();
            (scaled.width(), scaled.height())
        };
        assert_eq!(size(196, 196), (392, 392));
        assert_eq!(size(126, 126), (378, 378));
        assert_eq!(size(784, 392), (392, 196));
    }
}
