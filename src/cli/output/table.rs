//! The table of `list`, the host's line below it, and the addresses after a start.

use std::collections::BTreeMap;
use std::io;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table};

use super::Terminal;
use super::words;
use crate::ipc::protocol::{HostView, ListView, Row};
use crate::model::status::Status;

/// Which columns to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// Those that fit.
    Fitting,
    /// Every one: `--wide`.
    Every,
}

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Id,
    Name,
    Namespace,
    Slot,
    Generation,
    Mode,
    Pid,
    Uptime,
    Restarts,
    Status,
    Cpu,
    Memory,
    Heap,
    LoopDelay,
    Connections,
    Requests,
    Latency,
    Listen,
    Note,
}

impl Column {
    const ALL: [Self; 19] = [
        Self::Id,
        Self::Name,
        Self::Namespace,
        Self::Slot,
        Self::Generation,
        Self::Mode,
        Self::Pid,
        Self::Uptime,
        Self::Restarts,
        Self::Status,
        Self::Cpu,
        Self::Memory,
        Self::Heap,
        Self::LoopDelay,
        Self::Connections,
        Self::Requests,
        Self::Latency,
        Self::Listen,
        Self::Note,
    ];

    /// Given up in this order where the terminal is narrow; notes then follow below the table. Id, name and status
    /// always stay.
    const DROPPED: [Self; 8] = [
        Self::Note,
        Self::Mode,
        Self::Namespace,
        Self::Pid,
        Self::Restarts,
        Self::Cpu,
        Self::Memory,
        Self::Uptime,
    ];

    const fn title(self) -> &'static str {
        match self {
            Self::Id => "id",
            Self::Name => "name",
            Self::Namespace => "namespace",
            Self::Slot => "slot",
            Self::Generation => "gen",
            Self::Mode => "mode",
            Self::Pid => "pid",
            Self::Uptime => "uptime",
            Self::Restarts => "↺",
            Self::Status => "status",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Heap => "heap",
            Self::LoopDelay => "loop p99",
            Self::Connections => "conns",
            Self::Requests => "req/s",
            Self::Latency => "p95",
            Self::Listen => "listen",
            Self::Note => "note",
        }
    }

    const fn is_number(self) -> bool {
        matches!(
            self,
            Self::Id
                | Self::Slot
                | Self::Generation
                | Self::Pid
                | Self::Uptime
                | Self::Restarts
                | Self::Cpu
                | Self::Memory
                | Self::Heap
                | Self::LoopDelay
                | Self::Connections
                | Self::Requests
                | Self::Latency
        )
    }

    fn text(self, row: &Row) -> String {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let figures = row.figures.as_ref();
        let http = figures.and_then(|node| node.http.as_ref());
        match self {
            Self::Id => row.pm_id.to_string(),
            Self::Name => row.app.to_string(),
            Self::Namespace => row.namespace.clone(),
            Self::Slot => row.slot.to_string(),
            Self::Generation => or_dash(row.generation.map(|generation| generation.to_string())),
            Self::Mode => row.mode.clone(),
            Self::Pid => or_dash(row.pid.map(|pid| pid.to_string())),
            Self::Uptime => or_dash(row.uptime_ms.map(words::uptime)),
            Self::Restarts => row.restarts.to_string(),
            Self::Status => words::status(row),
            Self::Cpu => or_dash(row.cpu.map(words::percent)),
            Self::Memory => or_dash(row.memory.map(words::bytes)),
            Self::Heap => or_dash(figures.map(|node| words::bytes(node.heap_used))),
            Self::LoopDelay => {
                or_dash(figures.and_then(|node| Some(words::fine_millis(node.loop_delay?.p99))))
            }
            Self::Connections => or_dash(figures.map(|node| node.connections.to_string())),
            Self::Requests => or_dash(http.map(|http| words::rate(http.per_second))),
            Self::Latency => or_dash(http.and_then(|http| Some(words::fine_millis(http.latency?.p95)))),
            Self::Listen => row.listen.join(" "),
            Self::Note => row.note.clone().unwrap_or_default(),
        }
    }

    fn cell(self, row: &Row, color: bool) -> Cell {
        let cell = Cell::new(self.text(row));
        if color && self == Self::Status {
            return cell.fg(if row.unhealthy { Color::Red } else { status_color(row.status) });
        }
        if color && matches!(self, Self::Id | Self::Name) {
            return cell.fg(Color::Cyan);
        }
        cell
    }
}

/// Notes of more characters follow below the table: one of them would make every row as wide.
const NOTE_MAX: usize = 48;

const fn status_color(status: Status) -> Color {
    match status {
        Status::Online => Color::Green,
        Status::Launching | Status::Stopping | Status::WaitingRestart => Color::Yellow,
        Status::Stopped => Color::DarkGrey,
        Status::Errored => Color::Red,
    }
}

/// Prints the table, the host's line and the warnings.
///
/// # Errors
/// Standard output's.
pub fn print(view: &ListView, columns: Columns, terminal: &mut Terminal) -> io::Result<()> {
    let look = terminal.look();
    if look.silent {
        return Ok(());
    }
    let shown = shown_columns(view, columns, look.width);
    terminal.say(&list_table(view, &shown, look.width, look.color_out).to_string())?;
    if view.rows.is_empty() {
        terminal.say(
            "No apps yet. `pm start app.js` starts one, `pm init` writes a config file to start from.",
        )?;
    }
    if !shown.contains(&Column::Note) {
        for row in &view.rows {
            if let Some(note) = &row.note {
                terminal.say(&format!(" {} {}: {note}", row.pm_id, row.app))?;
            }
        }
    }
    if view.host.cores > 0 {
        terminal.say(&host_line(&view.host))?;
    }
    view.warnings.iter().try_for_each(|warning| terminal.error_line("warning:", warning))
}

fn shown_columns(view: &ListView, columns: Columns, width: Option<u16>) -> Vec<Column> {
    let worth_showing = |column: Column| match column {
        Column::Namespace => {
            columns == Columns::Every || view.rows.iter().any(|row| row.namespace != "default")
        }
        Column::Slot | Column::Generation | Column::Listen => columns == Columns::Every,
        Column::Heap | Column::LoopDelay | Column::Connections => {
            columns == Columns::Every && view.rows.iter().any(|row| row.figures.is_some())
        }
        Column::Requests | Column::Latency => {
            let http = |row: &Row| row.figures.as_ref().is_some_and(|node| node.http.is_some());
            columns == Columns::Every && view.rows.iter().any(http)
        }
        Column::Note => {
            let mut notes = view.rows.iter().filter_map(|row| row.note.as_ref()).peekable();
            notes.peek().is_some() && notes.all(|note| note.chars().count() <= NOTE_MAX)
        }
        _ => true,
    };
    let mut shown: Vec<Column> = Column::ALL.into_iter().filter(|&column| worth_showing(column)).collect();
    if let (Some(width), Columns::Fitting) = (width, columns) {
        for dropped in Column::DROPPED {
            if natural_width(&shown, &view.rows) <= usize::from(width) {
                break;
            }
            shown.retain(|&column| column != dropped);
        }
    }
    shown
}

fn list_table(view: &ListView, shown: &[Column], width: Option<u16>, color: bool) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    if !color {
        table.force_no_tty();
    } else {
        table.enforce_styling();
    }
    if let Some(width) = width {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    let title = |column: &Column| Cell::new(column.title());
    table.set_header(shown.iter().map(title));
    for row in &view.rows {
        table.add_row(shown.iter().map(|column| column.cell(row, color)));
    }
    for (index, column) in shown.iter().enumerate() {
        if column.is_number()
            && let Some(column) = table.column_mut(index)
        {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Columns that the table takes when nothing wraps: content, a blank on each side, and the rules.
fn natural_width(columns: &[Column], rows: &[Row]) -> usize {
    use unicode_width::UnicodeWidthStr;
    let content: usize = columns
        .iter()
        .map(|column| {
            let widest = rows.iter().map(|row| column.text(row).width()).max().unwrap_or(0);
            widest.max(column.title().width())
        })
        .sum();
    content + columns.len() * 3 + 1
}

fn host_line(host: &HostView) -> String {
    let [one, five, fifteen] = host.load;
    format!(
        "host: cpu {} of {} | load {one:.2} {five:.2} {fifteen:.2} | memory {} of {} | column cpu: of one core",
        words::percent(host.cpu),
        words::count(usize::try_from(host.cores).unwrap_or(usize::MAX), "core"),
        words::bytes(host.memory_used),
        words::bytes(host.memory_total),
    )
}

/// Prints where the apps that `wanted` accepts can be reached.
///
/// # Errors
/// Standard output's.
pub fn print_addresses(
    view: &ListView,
    wanted: impl Fn(&Row) -> bool,
    terminal: &mut Terminal,
) -> io::Result<()> {
    let mut apps: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut order: Vec<&str> = Vec::new();
    let listening = |row: &&Row| matches!(row.status, Status::Online | Status::Launching) && wanted(row);
    for row in view.rows.iter().filter(listening) {
        let name = row.app.as_str();
        let addresses = apps.entry(name).or_insert_with(|| {
            order.push(name);
            Vec::new()
        });
        for address in &row.listen {
            if !addresses.contains(&address.as_str()) {
                addresses.push(address);
            }
        }
    }
    for name in order {
        let addresses = &apps[name];
        if addresses.is_empty() {
            continue;
        }
        let shown: Vec<String> = addresses
            .iter()
            .map(|address| words::url(address).unwrap_or_else(|| (*address).to_owned()))
            .collect();
        let shown = terminal.on_out(&shown.join(" "), owo_colors::Style::new().bold());
        terminal.say(&format!("{name}: {shown}"))?;
    }
    Ok(())
}
