//! Pictures of figures as SVG: bars with their spread, and lines over a logarithmic axis.
//!
//! Without a background and in colours of medium lightness, so that they can be read on light and on dark pages.

use std::error::Error;

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::{
        ChartBuilder, Circle, Color as _, DrawingArea, EmptyElement, IntoDrawingArea as _, IntoFont as _,
        IntoLogRange as _, LineSeries, PathElement, RGBColor, Rectangle, SVGBackend, Text, TextStyle,
    },
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Bar, Line, Plot, PlotKind};

const INK: RGBColor = RGBColor(0x7d, 0x7d, 0x7d);
const COLOURS: [RGBColor; 5] = [
    RGBColor(0x8f, 0x8f, 0x8f),
    RGBColor(0x3b, 0x82, 0xc4),
    RGBColor(0xd9, 0x80, 0x32),
    RGBColor(0x4d, 0x9e, 0x5f),
    RGBColor(0x9a, 0x6f, 0xc2),
];
const WIDTH: i32 = 860;
/// Above the figures, for the title; below them, for the axis.
const TITLE: i32 = 40;
const AXIS: i32 = 46;
/// Of the names of bars, and of the values behind them.
const NAMES: i32 = 300;
const VALUES: i32 = 70;
const ROW: i32 = 24;
const LINES_HEIGHT: i32 = 400;
/// Ticks of an axis, about.
const TICKS: f64 = 6.0;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The picture as SVG.
pub(super) fn svg(plot: &Plot) -> Result<String> {
    let mut text = String::new();
    let drawn = match &plot.kind {
        PlotKind::Bars(list) => bars(&mut text, plot, list),
        PlotKind::Lines(axis, list) => lines(&mut text, plot, axis, list),
    };
    drawn.map_err(|error| anyhow!("{}: {error}", plot.name))?;
    Ok(text + "\n")
}

fn style(size: i32, horizontal: HPos) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(&INK)
        .pos(Pos::new(horizontal, VPos::Center))
}

fn title(area: &Area<'_>, plot: &Plot) -> Result<(), Box<dyn Error>> {
    area.draw(&Text::new(
        plot.title.clone(),
        (8, TITLE / 2),
        style(17, HPos::Left),
    ))?;
    Ok(())
}

/// A round step that divides a range into some parts.
fn step(range: f64) -> f64 {
    let rough = (range / TICKS).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|factor| power * factor >= rough);
    power * factor.unwrap_or(10.0)
}

/// With as many digits as tell something.
fn number(value: f64) -> String {
    if value >= 10.0 || value == 0.0 {
        format!("{value:.0}")
    } else if value >= 1.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

fn bars(text: &mut String, plot: &Plot, list: &[Bar]) -> Result<(), Box<dyn Error>> {
    let bottom = TITLE + ROW * list.len() as i32;
    let area = SVGBackend::with_string(text, (WIDTH as u32, (bottom + AXIS) as u32)).into_drawing_area();
    title(&area, plot)?;
    let most = list
        .iter()
        .map(|bar| bar.spread.most.max(bar.spread.median))
        .fold(1e-9, f64::max);
    let x = |value: f64| NAMES + (value.max(0.0) / most * f64::from(WIDTH - NAMES - VALUES)) as i32;
    let step = step(most);
    let mut tick = 0.0;
    while tick <= most {
        let at = x(tick);
        area.draw(&PathElement::new([(at, TITLE), (at, bottom)], INK.mix(0.35)))?;
        area.draw(&Text::new(
            number(tick),
            (at, bottom + 12),
            style(12, HPos::Center),
        ))?;
        tick += step;
    }
    let middle = (NAMES + WIDTH - VALUES) / 2;
    area.draw(&Text::new(
        plot.unit.clone(),
        (middle, bottom + 32),
        style(13, HPos::Center),
    ))?;
    for (row, bar) in (0..).zip(list) {
        let (top, centre) = (TITLE + ROW * row, TITLE + ROW * row + ROW / 2);
        let colour = COLOURS[bar.colour % COLOURS.len()];
        let name = Text::new(bar.label.clone(), (NAMES - 8, centre), style(13, HPos::Right));
        area.draw(&name)?;
        let corners = [(NAMES, top + 4), (x(bar.spread.median), top + ROW - 4)];
        area.draw(&Rectangle::new(corners, colour.filled()))?;
        let (least, most) = (x(bar.spread.least), x(bar.spread.most));
        area.draw(&PathElement::new(
            [(least, centre), (most, centre)],
            INK.stroke_width(1),
        ))?;
        for end in [least, most] {
            area.draw(&PathElement::new([(end, centre - 4), (end, centre + 4)], INK))?;
        }
        let value = number(bar.spread.median);
        area.draw(&Text::new(
            value,
            (most.max(x(bar.spread.median)) + 6, centre),
            style(13, HPos::Left),
        ))?;
    }
    area.present()?;
    Ok(())
}

fn lines(text: &mut String, plot: &Plot, axis: &str, list: &[Line]) -> Result<(), Box<dyn Error>> {
    let area = SVGBackend::with_string(text, (WIDTH as u32, LINES_HEIGHT as u32)).into_drawing_area();
    title(&area, plot)?;
    let points = || list.iter().flat_map(|line| &line.points);
    let first = points().map(|(x, _)| *x).fold(f64::MAX, f64::min);
    let last = points().map(|(x, _)| *x).fold(1.0, f64::max);
    let most = points().map(|(_, spread)| spread.most).fold(1e-9, f64::max);
    let body = area.margin(TITLE, 8, 8, 190);
    let mut chart = ChartBuilder::on(&body)
        .x_label_area_size(AXIS)
        .y_label_area_size(60)
        .build_cartesian_2d((first.min(last) * 0.8..last * 1.25).log_scale(), 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(INK.mix(0.35))
        .light_line_style(INK.mix(0.0))
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 13).into_font().color(&INK))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| number(*y))
        .x_desc(axis)
        .y_desc(plot.unit.clone())
        .draw()?;
    for (number, line) in list.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        chart.draw_series(LineSeries::new(
            line.points.iter().map(|(x, spread)| (*x, spread.median)),
            colour.stroke_width(2),
        ))?;
        chart.draw_series(
            line.points.iter().map(|(x, spread)| {
                PathElement::new([(*x, spread.least), (*x, spread.most)], colour.mix(0.7))
            }),
        )?;
        chart.draw_series(
            line.points
                .iter()
                .map(|(x, spread)| Circle::new((*x, spread.median), 3, colour.filled())),
        )?;
        if let Some((x, spread)) = line.points.last() {
            let label = line.label.clone();
            let text = style(13, HPos::Left).color(&colour);
            chart
                .plotting_area()
                .draw(&(EmptyElement::at((*x, spread.median)) + Text::new(label, (30, 0), text)))?;
        }
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Spread;

    #[test]
    fn steps_are_round() {
        assert_eq!(step(600.0), 100.0);
        assert_eq!(step(61.0), 20.0);
        assert_eq!(step(0.7), 0.2);
    }

    #[test]
    fn a_plot_names_what_it_shows_and_escapes_it() {
        let spread = Spread {
            median: 3.0,
            least: 2.0,
            most: 4.0,
        };
        let bar = Bar {
            label: "a < b".to_owned(),
            colour: 1,
            spread,
        };
        let line = Line {
            label: "request".to_owned(),
            points: vec![(1.0, spread), (4096.0, spread)],
        };
        for kind in [
            PlotKind::Bars(vec![bar]),
            PlotKind::Lines("flows".to_owned(), vec![line]),
        ] {
            let is_bars = matches!(kind, PlotKind::Bars(_));
            let plot = Plot {
                name: "x".to_owned(),
                title: "A title".to_owned(),
                unit: "ns".to_owned(),
                kind,
            };
            let text = svg(&plot).unwrap();
            assert!(text.contains("A title") && text.trim_end().ends_with("</svg>"));
            assert!(
                text.contains(if is_bars { "a &lt; b" } else { "request" }),
                "{text}"
            );
        }
    }
}
