// One block of 32 weights per cycle: scale * step * sum(w * x) + minimum * step * sum(x), exactly, in fixed point.
//
// `step` is what the block's activations count in and `x_sum` their sum, both from the activation buffer. A block that
// is not `used` gives 0 whatever its bits are. Latency: block_dot's, 4 and HAS_MIN cycles (a new block every cycle).
module block_lane #(
    parameter WEIGHT_BITS = 4,
    parameter HAS_MIN     = 0,
    parameter USE_DSP     = 0,
    parameter TERM_WIDTH  = (WEIGHT_BITS == 4 ? 97 : 100) + HAS_MIN
) (
    input  wire                         clk,
    input  wire                         used,
    input  wire [32 * WEIGHT_BITS-1:0]  weights,
    input  wire [15:0]                  scale,
    input  wire [15:0]                  minimum,
    input  wire [255:0]                 activations,
    input  wire [15:0]                  step,
    input  wire signed [12:0]           x_sum,
    output wire signed [TERM_WIDTH-1:0] term,
    output wire                         special
);
    localparam SUM_WIDTH = WEIGHT_BITS == 4 ? 17 : 20;
    localparam DOT_LATENCY = USE_DSP != 0 ? 6 : WEIGHT_BITS == 4 ? 7 : 8;

    wire signed [SUM_WIDTH-1:0] sum;
    block_dot #(
        .WEIGHT_BITS(WEIGHT_BITS), .OFFSET(HAS_MIN != 0 ? 0 : 8), .USE_DSP(USE_DSP)
    ) dot (.clk(clk), .weights(weights), .activations(activations), .sum(sum));

    // A scale of 0 makes the whole term 0, so that is how an unused block is left out.
    wire [15:0] scale_q, step_q;
    delay #(.WIDTH(32), .CYCLES(DOT_LATENCY - 1)) wait_for_sum (
        .clk(clk), .d({used ? scale : 16'd0, used ? step : 16'd0}), .q({scale_q, step_q})
    );
    localparam MAIN_WIDTH = SUM_WIDTH + 80;
    wire signed [MAIN_WIDTH-1:0] main;
    wire main_special;
    scaled #(.SUM_WIDTH(SUM_WIDTH)) main_part (
        .clk(clk), .scale(scale_q), .step(step_q), .sum(sum), .term(main), .special(main_special)
    );
    generate
        if (HAS_MIN != 0) begin : with_min
            wire [15:0] min_q;
            wire signed [12:0] x_sum_q;
            delay #(.WIDTH(16), .CYCLES(DOT_LATENCY - 1)) wait_min (.clk(clk), .d(used ? minimum : 16'd0), .q(min_q));
            delay #(.WIDTH(13), .CYCLES(DOT_LATENCY)) wait_x_sum (.clk(clk), .d(x_sum), .q(x_sum_q));
            wire signed [92:0] offset;
            wire offset_special;
            scaled #(.SUM_WIDTH(13)) offset_part (
                .clk(clk), .scale(min_q), .step(step_q), .sum(x_sum_q), .term(offset), .special(offset_special)
            );
            reg [TERM_WIDTH-1:0] both;
            reg either;
            always @(posedge clk) begin
                both   <= {main[MAIN_WIDTH-1], main} + {{(TERM_WIDTH - 93){offset[92]}}, offset};
                either <= main_special | offset_special;
            end
            assign term = both;
            assign special = either;
        end else begin : without_min
            assign term = main;
            assign special = main_special;
        end
    endgenerate
endmodule
