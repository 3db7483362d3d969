//! The tab of tunnels, with the traffic of the backends behind each.

use ratatui::layout::HorizontalAlignment::{Left, Right};

use super::{
    history::Trend,
    sheet::{Entry, Sheet, plain, quiet_zero, state},
};
use crate::{
    cli::status::{byte_rate, explanation},
    status::{Status, Traffic},
};

pub(super) fn sheet(status: &Status) -> Sheet {
    let rows = status.tunnels.iter().map(|tunnel| {
        let backends = status.groups.iter().flat_map(|group| &group.backends);
        let (mut behind, mut traffic) = (0, Traffic::default());
        for backend in backends.filter(|backend| backend.tunnel.as_ref() == Some(&tunnel.name)) {
            behind += 1;
            traffic.add(&backend.traffic);
        }
        let mut detail: Vec<String> = tunnel
            .why_kernel
            .iter()
            .map(|why| format!("kernel mode: {why}"))
            .collect();
        let explained = explanation(tunnel.diagnosis.as_ref(), tunnel.failure.as_deref());
        detail.extend(explained.iter().map(|line| line.trim_start().to_owned()));
        Entry {
            cells: vec![
                plain(&tunnel.name),
                state(&tunnel.mode),
                state(if tunnel.is_up { "up" } else { "down" }),
                plain(
                    tunnel
                        .address
                        .map_or_else(|| "-".to_owned(), |address| address.to_string()),
                ),
                state(&tunnel.health),
                plain(behind.to_string()),
                quiet_zero(tunnel.backends_held.to_string()),
                plain(traffic.flows.to_string()),
                quiet_zero(byte_rate(traffic.rates.bytes_in)),
                quiet_zero(byte_rate(traffic.rates.bytes_out)),
            ],
            trend: Trend::Tunnel(tunnel.name.clone()),
            detail,
        }
    });
    Sheet {
        columns: vec![
            ("TUNNEL", Left),
            ("MODE", Left),
            ("LINK", Left),
            ("FAR SIDE", Left),
            ("HEALTH", Left),
            ("BACKENDS", Right),
            ("HELD", Right),
            ("FLOWS", Right),
            ("IN/S", Right),
            ("OUT/S", Right),
        ],
        rows: rows.collect(),
        empty: "no tunnel is configured",
    }
}
