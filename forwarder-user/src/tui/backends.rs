//! The tab of backends, of all groups.

use ratatui::layout::HorizontalAlignment::{Left, Right};

use super::{
    history::Trend,
    sheet::{Entry, Sheet, plain, quiet_zero, state},
};
use crate::{
    cli::status::{byte_rate, rate, share, trouble},
    status::{BackendStatus, Status},
};

pub(super) fn sheet(status: &Status) -> Sheet {
    let backends = status
        .groups
        .iter()
        .flat_map(|group| group.backends.iter().map(move |backend| (group, backend)));
    let rows = backends.map(|(group, backend)| {
        let traffic = &backend.traffic;
        Entry {
            cells: vec![
                plain(format!("{}/{}", group.name, backend.name)),
                plain(backend.endpoint()),
                state(health(backend)),
                plain(backend.tunnel.as_deref().unwrap_or("-")),
                quiet_zero(share(backend.share)),
                plain(traffic.flows.to_string()),
                quiet_zero(rate(traffic.rates.connections)),
                quiet_zero(byte_rate(traffic.rates.bytes_in)),
                quiet_zero(byte_rate(traffic.rates.bytes_out)),
            ],
            trend: Trend::Backend(group.name.clone(), backend.name.clone()),
            detail: trouble(backend)
                .iter()
                .map(|line| line.trim_start().to_owned())
                .collect(),
        }
    });
    Sheet {
        columns: vec![
            ("BACKEND", Left),
            ("ADDRESS", Left),
            ("HEALTH", Left),
            ("VIA", Left),
            ("SHARE", Right),
            ("FLOWS", Right),
            ("NEW/S", Right),
            ("IN/S", Right),
            ("OUT/S", Right),
        ],
        rows: rows.collect(),
        empty: "no backend is configured",
    }
}

/// Its health, or that it takes no new flows whatever its health is.
fn health(backend: &BackendStatus) -> &str {
    match &backend.drain {
        Some(drain) if drain.is_done => "drained",
        Some(_) => "draining",
        None => &backend.health,
    }
}
