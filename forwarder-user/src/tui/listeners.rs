//! The tab of listeners.

use ratatui::layout::HorizontalAlignment::{Left, Right};

use super::{
    history::Trend,
    sheet::{Entry, Sheet, plain, quiet_zero},
};
use crate::{
    cli::status::{byte_rate, guards, rate},
    config::address::all_at_port,
    status::Status,
};

pub(super) fn sheet(status: &Status) -> Sheet {
    let rows = status.listeners.iter().map(|listener| {
        let traffic = &listener.traffic;
        let address = all_at_port(&listener.vips, &listener.port);
        Entry {
            cells: vec![
                plain(&listener.name),
                plain(format!("{address}/{}", listener.protocol)),
                plain(&listener.group),
                plain(traffic.flows.to_string()),
                quiet_zero(rate(traffic.rates.connections)),
                quiet_zero(byte_rate(traffic.rates.bytes_in)),
                quiet_zero(byte_rate(traffic.rates.bytes_out)),
                quiet_zero(traffic.connections_refused.to_string()),
            ],
            trend: Trend::Listener(listener.name.clone()),
            detail: [format!(
                "opened {}, answered {}, rejected {}, refused {}; resets: {} by clients, {} by backends, {} by the gateway",
                traffic.connections_opened,
                traffic.connections_answered,
                traffic.connections_rejected,
                traffic.connections_refused,
                traffic.client_resets,
                traffic.backend_resets,
                traffic.gateway_resets,
            )]
            .into_iter()
            .chain(guards(listener))
            .collect(),
        }
    });
    Sheet {
        columns: vec![
            ("LISTENER", Left),
            ("ADDRESS", Left),
            ("GROUP", Left),
            ("FLOWS", Right),
            ("NEW/S", Right),
            ("IN/S", Right),
            ("OUT/S", Right),
            ("REFUSED", Right),
        ],
        rows: rows.collect(),
        empty: "no listener is configured",
    }
}
