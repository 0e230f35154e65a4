//! A picture that is drawn on: rectangles, outlines, text.

use std::convert::Infallible;

use embedded_graphics::Drawable;
use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::iso_8859_1::{FONT_7X13, FONT_7X13_BOLD};
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::text::{Baseline, Text};

use super::ExplainError;

/// Red, green, blue.
pub(super) type Colour = [u8; 3];

/// Most pixels of a picture: what a viewer still opens.
const MOST_PIXELS: usize = 1 << 26;

/// Height of a line of text.
pub(super) const LINE: usize = 16;
/// Width of a letter.
pub(super) const LETTER: usize = 7;

/// An RGB picture.
pub(super) struct Canvas {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(width: usize, height: usize, colour: Colour) -> Result<Self, ExplainError> {
        let pixels = width.checked_mul(height).filter(|n| *n <= MOST_PIXELS);
        let Some(pixels) = pixels.filter(|n| *n > 0) else {
            return Err(ExplainError::Picture(format!(
                "the picture would have {width}×{height} pixels, more than {MOST_PIXELS}; explain fewer images or \
                 frames at once"
            )));
        };
        Ok(Self {
            width,
            height,
            rgb: colour.repeat(pixels),
        })
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn height(&self) -> usize {
        self.height
    }

    pub(super) fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Sets a pixel; outside of the picture, nothing happens.
    pub(super) fn set(&mut self, x: usize, y: usize, colour: Colour) {
        if x < self.width && y < self.height {
            let at = (y * self.width + x) * 3;
            self.rgb[at..at + 3].copy_from_slice(&colour);
        }
    }

    /// A frame of `thick` pixels inside of columns `x` and rows `y`.
    pub(super) fn outline(
        &mut self,
        x: std::ops::Range<usize>,
        y: std::ops::Range<usize>,
        thick: usize,
        colour: Colour,
    ) {
        for row in y.clone() {
            for column in x.clone() {
                let inside = |at: usize, of: &std::ops::Range<usize>| {
                    at >= of.start + thick && at + thick < of.end
                };
                if !inside(column, &x) || !inside(row, &y) {
                    self.set(column, row, colour);
                }
            }
        }
    }

    /// A line of text, its upper left corner at `x`, `y`.
    pub(super) fn text(&mut self, x: usize, y: usize, text: &str, bold: bool, colour: Colour) {
        let font: &MonoFont<'_> = match bold {
            true => &FONT_7X13_BOLD,
            false => &FONT_7X13,
        };
        let [r, g, b] = colour;
        let style = MonoTextStyle::new(font, Rgb888::new(r, g, b));
        let place = |at: usize| i32::try_from(at).unwrap_or(i32::MAX);
        let text = latin(text);
        let text = Text::with_baseline(&text, Point::new(place(x), place(y)), style, Baseline::Top);
        // Drawing on memory cannot fail.
        let Ok(_) = text.draw(self);
    }
}

/// The text in the letters that the font has: those of Latin-1.
fn latin(text: &str) -> String {
    let letter = |c: char| match c {
        '\u{2013}' | '\u{2014}' | '\u{2212}' => '-',
        '\u{2018}' | '\u{2019}' => '\'',
        '\u{201c}' | '\u{201d}' | '\u{201e}' => '"',
        '\n' | '\t' => ' ',
        c if (' '..='~').contains(&c) || ('\u{a0}'..='\u{ff}').contains(&c) => c,
        _ => '?',
    };
    text.chars().map(letter).collect()
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        let side = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Size::new(side(self.width), side(self.height))
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Self::Error>
    where
        I: IntoIterator<Item = Pixel<Self::Color>>,
    {
        for Pixel(at, colour) in pixels {
            if let (Ok(x), Ok(y)) = (usize::try_from(at.x), usize::try_from(at.y)) {
                self.set(x, y, [colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}

/// `share` of the second colour, the rest of the first.
pub(super) fn mixed(first: Colour, second: Colour, share: f32) -> Colour {
    std::array::from_fn(|c| {
        let (a, b) = (f32::from(first[c]), f32::from(second[c]));
        (a + (b - a) * share).round() as u8
    })
}

/// A colour of the wheel, `turn` of the way round it.
pub(super) fn hue(turn: f32) -> Colour {
    let place = |shift: f32| {
        let at = ((turn + shift).fract() * 6.0 - 3.0).abs() - 1.0;
        (70.0 + 185.0 * at.clamp(0.0, 1.0)) as u8
    };
    [place(0.0), place(2.0 / 3.0), place(1.0 / 3.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_drawn_in_letters_that_there_are() {
        assert_eq!(latin("1–3 “é” 語"), "1-3 \"é\" ?");
        let mut canvas = Canvas::new(40, 16, [255; 3]).unwrap();
        canvas.text(2, 1, "Ab", true, [0; 3]);
        let dark = canvas.rgb().chunks(3).filter(|p| **p == [0; 3]).count();
        assert!((15..100).contains(&dark), "{dark} pixels of two letters");
        // Beyond the edge nothing is drawn.
        canvas.text(1000, 1000, "A", false, [0; 3]);
    }

    #[test]
    fn outlines_lie_inside() {
        let mut canvas = Canvas::new(6, 6, [0; 3]).unwrap();
        canvas.outline(1..5, 1..5, 1, [9; 3]);
        let set: Vec<bool> = canvas.rgb().chunks(3).map(|p| p[0] == 9).collect();
        assert_eq!(set.iter().filter(|s| **s).count(), 12);
        assert!(set[7] && set[10] && !set[14] && !set[0] && !set[11]);
    }

    #[test]
    fn hues_differ_and_large_pictures_are_errors() {
        assert_eq!(hue(0.0), [255, 70, 70]);
        assert_eq!(hue(1.0 / 3.0)[1], 255);
        let error = Canvas::new(1 << 20, 1 << 20, [0; 3]).err().unwrap();
        assert!(error.to_string().contains("fewer images"), "{error}");
    }
}
