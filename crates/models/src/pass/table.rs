//! Rows that components have in place of some of a table's own: where tokens are looked up, and where the table is the weight of a
//! head.
//!
//! ```text
//! x_td[t] = r_kd                 dr_kd[k] = Σ_t dx_td[t]            of rows t with the component's k-th token
//! y_tv[token_k] = x_td · r_kd    dr_kd = dy_tk^T x_td               dx_td += dy_tk r_kd
//! ```
//! Axes: T rows, D hidden, V vocabulary, K tokens of a component.

use std::collections::BTreeMap;
use std::ops::Range;

use attune_architecture::{Site, SiteId};
use attune_points::adapter::{Port, TableMap};
use attune_points::{Error, Result, Row, TensorId};
use attune_tensor::kernels::{Gemm, Operand};
use attune_tensor::view::{MatMut, MatRef, View, ViewMut};
use candle_core::{Device, Tensor, Var};

use crate::pass::arena::Mat;
use crate::pass::local;
use crate::pass::parts::{Given, PassCx, Placed, Sinks};
use crate::pass::weight::Weighed;

/// A component with rows in a table.
pub(crate) type Table<'a> = Placed<'a, &'a dyn TableMap>;

/// The place of each token among those of a component.
pub(crate) fn places(map: &dyn TableMap) -> BTreeMap<u32, usize> {
    map.tokens().iter().copied().zip(0..).collect()
}

/// The rows of a component, if they are as many as it has tokens, all of a table of this shape.
///
/// # Errors
/// [`Error::Refused`] if they are not.
pub(crate) fn checked(map: &dyn TableMap, rows_kd: Tensor, (vocab, width): (usize, usize)) -> Result<Tensor> {
    let tokens = map.tokens();
    let expected = (tokens.len(), width);
    if rows_kd.dims2()? != expected {
        let message = format!("a component made {:?} as rows of a table; expected {expected:?}", rows_kd.shape());
        return Err(Error::Refused(message));
    }
    match tokens.iter().find(|token| **token as usize >= vocab) {
        None => Ok(rows_kd),
        Some(token) => Err(Error::Refused(format!("a component has a row for token {token}; there are {vocab}"))),
    }
}

/// Why what makes another product of a head does not go together with rows in its table.
pub(crate) fn clash(site: &SiteId) -> Error {
    Error::Refused(format!(
        "{site} has rows of a component in its table, and another component makes a new weight or stands at an end of its product: \
         expected one of the two"
    ))
}

/// What the reverse of a head with rows of components leaves to do.
pub(crate) struct Columns {
    /// The gradient by logits without those of tokens that have rows of their own.
    pub(crate) left: Mat,
    /// The rows given, the gradient by their logits of such tokens, and the rows of the component.
    back: Vec<(Range<usize>, Mat, Mat)>,
}

impl<'a> PassCx<'a> {
    /// The components with rows in the table that is the weight at `site`.
    pub(crate) fn tables<'g>(&self, site: &Site, given: Given<'g>) -> Vec<Table<'g>>
    where
        'a: 'g,
    {
        // No table stands in a layer.
        if site.layer.is_some() {
            return Vec::new();
        }
        let kept = SiteId::new(self.base.tensor_name(site.id.as_str(), "weight").owner());
        let tables = self.placed(&kept, given).into_iter().filter_map(|placed| match placed.port {
            Port::Table(map) => Some(placed.with(map)),
            _ => None,
        });
        tables.collect()
    }

    /// The rows of a component.
    fn rows_of(&self, table: &Table<'_>, leaves: &[(TensorId, Var)]) -> Result<Tensor> {
        let rows_kd = table.port.graph(&local::locals(self.parts, table, leaves)?)?;
        checked(table.port, rows_kd, (self.architecture().vocab, self.architecture().hidden))
    }

    /// The same in the type of the activations.
    fn mat_of(&self, table: &Table<'_>) -> Result<Mat> {
        let rows_kd = self.rows_of(table, &[])?;
        let (k, width) = rows_kd.dims2()?;
        let mut rows = self.arena.rows(k, width);
        local::write(&rows_kd, rows.view_mut(), false)?;
        Ok(self.narrowed(rows))
    }

    /// Gradients of what makes the rows of a component, by theirs.
    fn pull_rows(
        &self,
        table: &Table<'_>,
        leaves: &[(TensorId, Var)],
        by_rows: Vec<f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<()> {
        let rows_kd = self.rows_of(table, leaves)?;
        let by_rows = Tensor::from_vec(by_rows, rows_kd.dims2()?, &Device::Cpu)?;
        local::pull(&rows_kd, &by_rows, leaves, &mut *sinks[table.part])?;
        Ok(())
    }

    /// The components of a part with rows in the table of tokens; and for each row of the part the one whose row it is, by its
    /// place among them, with the place of that row among its own.
    fn looked_up(&self, part: usize, tokens: &Site) -> (Vec<Table<'a>>, Vec<Option<(usize, usize)>>) {
        let tables: Vec<Table<'a>> =
            self.tables(tokens, Given::All).into_iter().filter(|table| table.part == part).collect();
        let first = self.rows[part].start;
        let rows = self.parts[part].layout.rows();
        let mut found = vec![None; if tables.is_empty() { 0 } else { rows.len() }];
        for (index, table) in tables.iter().enumerate() {
            let places = places(table.port);
            for row in table.rows.start - first..table.rows.end - first {
                let Row::Token(token) = rows[row] else { continue };
                if let Some(&k) = places.get(&token) {
                    found[row] = Some((index, k));
                }
            }
        }
        (tables, found)
    }

    /// Writes rows of components in the place of those that were looked up for a part, `x_td`.
    ///
    /// # Errors
    /// Whatever a component raises.
    pub(crate) fn look_up(&self, part: usize, tokens: &Site, mut x_td: ViewMut<'_, f32>) -> Result<()> {
        let (tables, found) = self.looked_up(part, tokens);
        for (index, table) in tables.iter().enumerate() {
            let own: Vec<(usize, usize)> = of_component(&found, index).collect();
            if own.is_empty() {
                continue;
            }
            let rows_kd = self.rows_of(table, &[])?;
            let mut room = self.arena.rows(rows_kd.dim(0)?, rows_kd.dim(1)?);
            local::write(&rows_kd, room.view_mut(), false)?;
            for (row, k) in own {
                x_td.row(row).copy_from_slice(room.view().row(k));
            }
        }
        Ok(())
    }

    /// The reverse of [`PassCx::look_up`], from the gradient by the rows of the part. Says which of these are not the table's own;
    /// nothing, if all are.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn look_up_vjp(
        &self,
        part: usize,
        tokens: &Site,
        dx_td: View<'_, f32>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Vec<bool>> {
        let (tables, found) = self.looked_up(part, tokens);
        for (index, table) in tables.iter().enumerate() {
            let leaves = local::leaves(self.parts, table, sinks)?;
            if leaves.is_empty() {
                continue;
            }
            let width = dx_td.cols();
            // Tokens that do not occur have a gradient too: none.
            let mut sums = vec![0.0f32; table.port.tokens().len() * width];
            for (row, k) in of_component(&found, index) {
                let to = &mut sums[k * width..][..width];
                to.iter_mut().zip(dx_td.row(row)).for_each(|(sum, dx)| *sum += dx);
            }
            self.pull_rows(table, &leaves, sums, sinks)?;
        }
        Ok(found.into_iter().map(|at| at.is_some()).collect())
    }

    /// Writes logits of tokens that components have rows for, of what a head read, in the place of the table's own.
    ///
    /// # Errors
    /// Whatever a component raises; one whose product is not the table's.
    pub(crate) fn columns(
        &self,
        site: &Site,
        tables: &[Table<'_>],
        weighed: &[Weighed<'_>],
        x_ti: MatRef<'_>,
        mut y_to: ViewMut<'_, f32>,
    ) -> Result<()> {
        if weighed.iter().any(|of| of.is_made() || !of.ends.is_empty()) {
            return Err(clash(&site.id));
        }
        for table in tables {
            let rows_kd = self.mat_of(table)?;
            let x = x_ti.sub_rows(table.rows.start, table.rows.end);
            let mut own = self.arena.rows(x.rows(), table.port.tokens().len());
            let of = Gemm::new(Operand::plain(x), Operand::transposed(rows_kd.view()));
            self.kernels.gemm(own.view_mut(), &of);
            for row in 0..x.rows() {
                let to = y_to.row(table.rows.start + row);
                let logits = table.port.tokens().iter().zip(own.view().row(row));
                logits.for_each(|(&token, logit)| to[token as usize] = *logit);
            }
        }
        Ok(())
    }

    /// The reverse of [`PassCx::columns`], but for the gradient by what the head read: [`PassCx::add_columns`] adds it.
    ///
    /// # Errors
    /// Whatever a component or a sink raises.
    pub(crate) fn columns_vjp(
        &self,
        tables: &[Table<'_>],
        x_ti: MatRef<'_>,
        dy_to: MatRef<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Columns> {
        let mut left = self.arena.mat(dy_to.rows(), dy_to.cols(), self.dtype);
        self.kernels.convert(dy_to, left.view_mut());
        let mut back = Vec::with_capacity(tables.len());
        // What is written last is what counts.
        for table in tables.iter().rev() {
            let rows_kd = self.mat_of(table)?;
            let x = x_ti.sub_rows(table.rows.start, table.rows.end);
            let mut g = self.arena.rows(x.rows(), table.port.tokens().len());
            take(left.view_mut(), &table.rows, table.port.tokens(), g.view_mut());
            let g_tk = self.narrowed(g);
            let leaves = local::leaves(self.parts, table, sinks)?;
            if !leaves.is_empty() {
                let (k, width) = (table.port.tokens().len(), x.cols());
                let mut sums = vec![0.0f32; k * width];
                let of = Gemm::new(Operand::transposed(g_tk.view()), Operand::plain(x));
                self.kernels.gemm(ViewMut::new(&mut sums, k, width), &of);
                self.pull_rows(table, &leaves, sums, sinks)?;
            }
            back.push((table.rows.clone(), g_tk, rows_kd));
        }
        Ok(Columns { left, back })
    }

    /// Adds what goes back through rows of components to the gradient by what a head read.
    pub(crate) fn add_columns(&self, columns: &Columns, mut dx_ti: ViewMut<'_, f32>) {
        for (rows, g_tk, rows_kd) in &columns.back {
            let of = Gemm::new(Operand::plain(g_tk.view()), Operand::plain(rows_kd.view()));
            self.kernels.gemm(dx_ti.reborrow().into_sub_rows(rows.start, rows.end), &Gemm { accumulate: true, ..of });
        }
    }
}

/// The rows that are a component's, each with the place of its row among the component's own.
fn of_component(found: &[Option<(usize, usize)>], index: usize) -> impl Iterator<Item = (usize, usize)> {
    let own = found.iter().enumerate();
    own.filter_map(move |(row, at)| at.filter(|(of, _)| *of == index).map(|(_, k)| (row, k)))
}

/// Moves the columns of some tokens, on some rows, out of a gradient.
fn take(from: MatMut<'_>, rows: &Range<usize>, tokens: &[u32], mut to: ViewMut<'_, f32>) {
    fn moved<T: Copy + Default>(from: &mut [T], tokens: &[u32], to: &mut [f32], wide: impl Fn(T) -> f32) {
        to.iter_mut().zip(tokens).for_each(|(to, token)| *to = wide(std::mem::take(&mut from[*token as usize])));
    }
    match from {
        MatMut::F32(mut from) => {
            rows.clone().enumerate().for_each(|(at, row)| moved(from.row(row), tokens, to.row(at), |v| v));
        }
        MatMut::Bf16(mut from) => {
            rows.clone()
                .enumerate()
                .for_each(|(at, row)| moved(from.row(row), tokens, to.row(at), |v: half::bf16| v.to_f32()));
        }
    }
}
