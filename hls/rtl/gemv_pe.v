// The GEMV processing element of one memory channel: y = w x for the rows of w that the channel holds.
//
// Per cycle it takes one 512-bit beat of the channel's stream (../README.md, "The engine": headers S and SM) and multiplies LANES blocks of
// 32 weights with their activations, held on chip. Everything up to the end of a row is exact (fixed point, ACC_WIDTH
// bits with 48 behind the point); a row's sum is rounded once, to float32. So results do not depend on LANES.
//
//   command     rows of `blocks` blocks each, 2**exponent to multiply all results with, and whether activations are
//               loaded first (`load`) or stay as they are (several matrices, one x).
//   x           `blocks` words {step, 32 int8} after a command that loads.
//   w           the beats of the rows, one row behind the other without a gap.
//   y           one float32 per row, in order.
//
// All four are valid/ready: a transfer happens in a cycle in which both are high; valid does not wait for ready. Nothing
// inside ever stops: a row is let in only with a credit for its place in the result FIFO, so that no enable has to reach
// thousands of registers. `rst` (synchronous) forgets everything.
//
// Timing, with no stalls (runtime/fpga/cycles.py has the formula and the test holds it to this file): one cycle for the
// command, blocks + 4 to load x, per row a header beat for each 32 blocks (with minima 16) begun and ceil(blocks / LANES)
// cycles of weights, then the latency of the pipeline. A command may follow while rows are still in it.
module gemv_pe #(
    parameter WEIGHT_BITS = 4,         // 4 or 8
    parameter LANES       = 4,         // blocks per cycle: 1, 2 or 4; at most the 512 / (32 * WEIGHT_BITS) of a beat
    parameter HAS_MIN     = 0,         // 1: headers are pairs of a float16 scale and a float16 minimum (SM), 0: scales (S)
    parameter USE_DSP     = 0,         // 1: products in DSP blocks, 0: in LUTs
    parameter MAX_BLOCKS  = 1024,      // of one row: in_features up to 32768
    parameter OUT_DEPTH   = 32
) (
    input  wire               clk,
    input  wire               rst,

    input  wire               command_valid,
    output wire               command_ready,
    input  wire [23:0]        command_rows,      // at least 1
    input  wire [15:0]        command_blocks,    // 1..MAX_BLOCKS
    input  wire signed [8:0]  command_exponent,
    input  wire               command_load,

    input  wire               x_valid,
    output wire               x_ready,
    input  wire [271:0]       x_data,

    input  wire               w_valid,
    output wire               w_ready,
    input  wire [511:0]       w_data,

    output wire               y_valid,
    input  wire               y_ready,
    output wire [31:0]        y_data
);
    localparam BLOCK_BITS  = 32 * WEIGHT_BITS;
    localparam HEADER_BITS = HAS_MIN != 0 ? 32 : 16;        // of a block
    localparam [15:0] BEAT_BLOCKS   = WEIGHT_BITS == 4 ? 16'd4 : 16'd2;
    localparam [15:0] HEADER_BLOCKS = HAS_MIN != 0 ? 16'd16 : 16'd32;
    localparam [15:0] WORD          = LANES[15:0];          // blocks in a cycle
    localparam LOG_LANES   = $clog2(LANES);
    localparam TERM_WIDTH  = (WEIGHT_BITS == 4 ? 97 : 100) + HAS_MIN;
    // 2**12 blocks of int8 or 2**14 of int4 reach 2**111; MAX_BLOCKS is less.
    localparam ACC_WIDTH   = 112;
    localparam LANE_LATENCY = (USE_DSP != 0 ? 6 : WEIGHT_BITS == 4 ? 7 : 8) + 4 + HAS_MIN;
    // From a word of weights at the lanes to the accumulator.
    localparam SUM_LATENCY = LANE_LATENCY + LOG_LANES;

    // ---- What is read next -----------------------------------------------------------------------------------------
    localparam IDLE = 2'd0, LOAD = 2'd1, SETTLE = 2'd2, RUN = 2'd3;
    reg [1:0]  state;
    reg        header;                 // the next beat is one
    reg [23:0] rows_left;
    reg [15:0] blocks, block;          // of a row; first block of the next word (LOAD: next block of x)
    reg signed [8:0] exponent;
    reg [1:0]  settle;
    reg [2:0]  words_left;             // words of LANES blocks still to come out of the beat that was taken
    reg [511:0] beat, scales;          // shifted down as blocks are used up
    reg [$clog2(OUT_DEPTH):0] credits;

    wire taken     = w_valid && w_ready;
    wire pop       = y_valid && y_ready;
    wire issue     = (taken && !header) || words_left != 0;
    wire [15:0] next_block = block + WORD;
    wire row_ends  = next_block >= blocks;
    wire row_taken = issue && row_ends;
    wire group_ends = next_block % HEADER_BLOCKS == 0;
    wire [15:0] after = blocks - block;                     // blocks of the row from here on
    wire [15:0] in_beat = after < BEAT_BLOCKS ? after : BEAT_BLOCKS;
    wire [15:0] words_in_beat = (in_beat + WORD - 1'b1) >> LOG_LANES;

    assign command_ready = state == IDLE && words_left == 0;
    assign x_ready       = state == LOAD;
    assign w_ready       = state == RUN && words_left == 0 && credits != 0;

    always @(posedge clk) begin
        if (rst) begin
            state      <= IDLE;
            words_left <= 0;
            credits    <= OUT_DEPTH;
        end else begin
            if (row_taken && !pop) credits <= credits - 1'b1;
            if (pop && !row_taken) credits <= credits + 1'b1;
            case (state)
                IDLE: if (command_valid && command_ready) begin
                    rows_left <= command_rows;
                    blocks    <= command_blocks;
                    exponent  <= command_exponent;
                    block     <= 0;
                    header    <= 1;
                    settle    <= 0;
                    state     <= command_load ? LOAD : RUN;
                end
                LOAD: if (x_valid) begin
                    block <= block + 1'b1;
                    if (block + 1'b1 == blocks) begin
                        block <= 0;
                        state <= SETTLE;
                    end
                end
                SETTLE: begin          // the last block reaches its memory (activation_buffer.v)
                    settle <= settle + 1'b1;
                    if (settle == 3) state <= RUN;
                end
                default: begin
                    if (taken) header <= 0;
                    if (issue) begin
                        block      <= row_ends ? 16'd0 : next_block;
                        words_left <= (taken ? words_in_beat[2:0] : words_left) - 1'b1;
                        if (row_ends || group_ends) header <= 1;
                        if (row_ends) rows_left <= rows_left - 1'b1;
                        if (row_ends && rows_left == 1) state <= IDLE;
                    end
                end
            endcase
        end
        if (taken && header) scales <= w_data;
        if (issue) begin
            scales <= scales >> (HEADER_BITS * LANES);
            beat   <= (taken ? w_data : beat) >> (BLOCK_BITS * LANES);
        end
    end

    // ---- One word of LANES blocks into the pipeline ----------------------------------------------------------------
    reg valid0, first0, last0, valid1, first1, last1;
    reg signed [8:0] exponent0, exponent1;
    reg [LANES-1:0] used0, used1;
    reg [BLOCK_BITS * LANES-1:0] weights0, weights1;
    reg [HEADER_BITS * LANES-1:0] scales0, scales1;
    wire [285 * LANES-1:0] x1;
    integer i;
    always @(posedge clk) begin
        valid0    <= issue && !rst;
        first0    <= block == 0;
        last0     <= row_ends;
        exponent0 <= exponent;
        weights0  <= taken ? w_data[BLOCK_BITS * LANES-1:0] : beat[BLOCK_BITS * LANES-1:0];
        scales0   <= scales[HEADER_BITS * LANES-1:0];
        for (i = 0; i < LANES; i = i + 1) used0[i] <= i < after;

        valid1    <= valid0 && !rst;
        first1    <= first0;
        last1     <= last0;
        exponent1 <= exponent0;
        weights1  <= weights0;
        scales1   <= scales0;
        used1     <= used0;
    end
    activation_buffer #(.LANES(LANES), .MAX_BLOCKS(MAX_BLOCKS)) activations (
        .clk(clk), .write(x_valid && x_ready), .write_block(block), .write_data(x_data),
        .read_word(block >> LOG_LANES), .read_data(x1)
    );

    wire [TERM_WIDTH * LANES-1:0] terms;
    wire [LANES-1:0] special;
    genvar lane;
    generate
        for (lane = 0; lane < LANES; lane = lane + 1) begin : lanes
            wire [284:0] x = x1[285 * lane +: 285];
            block_lane #(.WEIGHT_BITS(WEIGHT_BITS), .HAS_MIN(HAS_MIN), .USE_DSP(USE_DSP)) block_lane (
                .clk(clk), .used(used1[lane]), .weights(weights1[BLOCK_BITS * lane +: BLOCK_BITS]),
                .scale(scales1[HEADER_BITS * lane +: 16]),
                .minimum(HAS_MIN != 0 ? scales1[HEADER_BITS * (lane + 1) - 16 +: 16] : 16'd0),
                .activations(x[255:0]), .step(x[271:256]), .x_sum(x[284:272]),
                .term(terms[TERM_WIDTH * lane +: TERM_WIDTH]), .special(special[lane])
            );
        end
    endgenerate

    // ---- The sum of a row ------------------------------------------------------------------------------------------
    localparam SUM_WIDTH = TERM_WIDTH + LOG_LANES;
    wire [SUM_WIDTH-1:0] word_sum;
    adder_tree #(.LEVELS(LOG_LANES), .WIDTH(TERM_WIDTH)) tree (.clk(clk), .terms(terms), .sum(word_sum));
    wire word_special;
    delay #(.WIDTH(1), .CYCLES(LOG_LANES)) beside_tree (.clk(clk), .d(|special), .q(word_special));

    // Bits that say what a word is must not survive a reset: the pipeline drains into nothing.
    reg [SUM_LATENCY-1:0] valid_line;
    wire first, last;
    wire valid = valid_line[SUM_LATENCY-1];
    wire signed [8:0] exponent_sum;
    always @(posedge clk) valid_line <= rst ? 0 : {valid_line[SUM_LATENCY-2:0], valid1};
    delay #(.WIDTH(11), .CYCLES(SUM_LATENCY)) beside_lanes (
        .clk(clk), .d({first1, last1, exponent1}), .q({first, last, exponent_sum})
    );

    wire [ACC_WIDTH-1:0] zero = 0;
    reg [ACC_WIDTH-1:0] total;
    reg total_special;
    reg [6:0] done;                    // done[0]: `total` is a row's; done[6]: its float32 is there
    reg signed [8:0] total_exponent;
    always @(posedge clk) begin
        if (valid) begin
            total         <= (first ? zero : total) + {{(ACC_WIDTH - SUM_WIDTH){word_sum[SUM_WIDTH-1]}}, word_sum};
            total_special <= (!first && total_special) || word_special;
        end
        total_exponent <= exponent_sum;
        done <= rst ? 7'd0 : {done[5:0], valid && last};
    end

    wire [31:0] y;
    to_float32 #(.WIDTH(ACC_WIDTH)) convert (
        .clk(clk), .value(total), .exponent(total_exponent), .special(total_special), .result(y)
    );
    result_fifo #(.WIDTH(32), .DEPTH(OUT_DEPTH)) results (
        .clk(clk), .rst(rst), .write(done[6]), .write_data(y), .valid(y_valid), .ready(y_ready), .data(y_data)
    );
endmodule
